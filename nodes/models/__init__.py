"""What is done to models beside running them: looking at how right they are, cutting, making small."""
