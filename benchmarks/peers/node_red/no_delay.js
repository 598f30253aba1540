// TCP_NODELAY for every connection; mqtt.js leaves it off, which costs 40 ms a message at QoS 1.
const net = require("node:net");
const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function (...args) {
    this.setNoDelay(true);
    return connect.apply(this, args);
};
