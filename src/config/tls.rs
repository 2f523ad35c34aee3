//! `[tls]`: a second port, encrypted.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A second port, encrypted, for relays without a reverse proxy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Address and port; empty = none.
    pub listen: String,
    /// PEM file with the certificate and those between it and its root.
    pub certificate: String,
    /// PEM file with the private key.
    pub key: String,
}

impl Tls {
    /// Where TLS is spoken; `None` where it is not.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn addr(&self) -> Result<Option<SocketAddr>, std::net::AddrParseError> {
        if self.listen.is_empty() { Ok(None) } else { self.listen.parse().map(Some) }
    }

    /// The key of the setting that is missing, if one is.
    pub fn missing(&self) -> Option<&'static str> {
        match (self.listen.is_empty(), self.certificate.is_empty(), self.key.is_empty()) {
            (true, ..) | (false, false, false) => None,
            (false, true, _) => Some("tls.certificate"),
            (false, false, true) => Some("tls.key"),
        }
    }
}
