"""The embedded MQTT broker: sans-I/O core, codecs of MQTT 5 and 3.1.1, and the server around them."""
