// Node-RED without its editor: what runs on a gateway.
module.exports = {
    httpAdminRoot: false,
    httpNodeRoot: false,
    disableEditor: true,
    credentialSecret: false,
    contextStorage: { default: { module: "memory" } },
    logging: { console: { level: "warn", metrics: false, audit: false } },
};
