//! To a relay's door: its address, a socket with or without TLS, and what it tells about itself (NIP-11).
//!
//! In: a URL that a person wrote. Out: a stream of bytes, or [`About`]. What a relay says here is believed only as far
//! as it helps to ask the right way; nothing that keeps data safe depends on it.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::link::LinkError;
use super::wire::{Passed, Wire};

/// Bytes of a relay information document; common ones have some thousand.
const ABOUT_BYTES_MAX: usize = 256 * 1024;

/// A socket, encrypted or not.
pub trait Bytes: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Bytes for T {}

/// Where a relay is, taken from its URL.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelayUrl {
    text: String,
    secure: bool,
    host: String,
    port: u16,
}

impl RelayUrl {
    /// Reads a `ws://` or `wss://` URL.
    ///
    /// # Errors
    /// [`LinkError::Url`], which repeats it.
    pub fn parse(text: &str) -> Result<RelayUrl, LinkError> {
        let refuse = |problem| LinkError::Url { url: text.to_owned(), problem };
        let uri: hyper::Uri = text.trim().parse().map_err(|_| refuse("cannot be read"))?;
        let secure = match uri.scheme_str() {
            Some("wss") => true,
            Some("ws") => false,
            _ => return Err(refuse("must begin with wss:// or ws://")),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| refuse("names no host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Ok(RelayUrl { text: text.trim().to_owned(), secure, host, port })
    }

    /// The URL as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Opens a socket; what passes on it is counted.
    ///
    /// # Errors
    /// [`LinkError::Unreachable`] with the system's or TLS's reason.
    pub async fn connect(&self, passed: &Passed) -> Result<Box<dyn Bytes>, LinkError> {
        let unreachable = |error: &dyn fmt::Display| LinkError::Unreachable(error.to_string());
        let socket = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(|error| unreachable(&error))?;
        // An event must not wait for the acknowledgement of the one before.
        socket.set_nodelay(true).map_err(|error| unreachable(&error))?;
        let socket = Wire::new(socket, passed.clone());
        if !self.secure {
            return Ok(Box::new(socket));
        }
        let name = ServerName::try_from(self.host.clone()).map_err(|error| unreachable(&error))?;
        let config = tls().as_ref().map_err(|problem| unreachable(problem))?;
        let tls = tokio_rustls::TlsConnector::from(Arc::clone(config)).connect(name, socket).await;
        Ok(Box::new(tls.map_err(|error| unreachable(&error))?))
    }

    /// Asks the relay what it is (NIP-11). A relay that does not say, or too late, is one about which nothing is known.
    pub async fn about(&self, timeout: Duration, passed: &Passed) -> About {
        match tokio::time::timeout(timeout, self.fetch_about(passed)).await {
            Ok(Ok(about)) => about,
            Ok(Err(reason)) => {
                tracing::debug!(relay = %self, reason, "no relay information");
                About::default()
            }
            Err(_) => About::default(),
        }
    }

    async fn fetch_about(&self, passed: &Passed) -> Result<About, String> {
        let text = |error: &dyn fmt::Display| error.to_string();
        let socket = self.connect(passed).await.map_err(|error| text(&error))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await;
        let (mut sender, connection) = handshake.map_err(|error| text(&error))?;
        let uri: hyper::Uri = self.text.parse().map_err(|error| text(&error))?;
        let request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()))
            .header(header::HOST, uri.authority().map_or(self.host.as_str(), |authority| authority.as_str()))
            .header(header::ACCEPT, "application/nostr+json")
            .header(header::CONNECTION, "close")
            .body(Empty::<bytes::Bytes>::new())
            .map_err(|error| text(&error))?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(|error| text(&error))?;
            let body = Limited::new(response.into_body(), ABOUT_BYTES_MAX).collect().await;
            Ok::<_, String>(body.map_err(|error| text(&error))?.to_bytes())
        };
        // The connection works as long as it is polled, and ends with the exchange. How is told by the exchange.
        let (body, _) = tokio::join!(exchange, connection);
        let body = body?;
        serde_json::from_slice(&body).map(|document| About::read(&document)).map_err(|error| text(&error))
    }
}

impl fmt::Display for RelayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a relay's information document says that changes how it is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// NIPs that it implements; `None`: it does not say.
    pub nips: Option<Vec<u16>>,
    /// Whether it keeps settings in slots of their own (`"sync":{"slots":1}`).
    pub slots: bool,
    /// Bytes of one message to it.
    pub message_bytes_max: Option<u64>,
    /// Stored events that it gives for one filter.
    pub limit_max: Option<u64>,
}

impl About {
    /// Reads a document; a field of the wrong form is one that is not there.
    pub fn read(document: &Value) -> About {
        let nips = document["supported_nips"].as_array();
        let number = |nip: &Value| nip.as_u64().and_then(|nip| u16::try_from(nip).ok());
        About {
            nips: nips.map(|nips| nips.iter().filter_map(number).collect()),
            slots: document["sync"]["slots"].as_u64().is_some_and(|slots| slots >= 1),
            message_bytes_max: document["limitation"]["max_message_length"].as_u64(),
            limit_max: document["limitation"]["max_limit"].as_u64(),
        }
    }

    /// Whether it says that it implements this NIP.
    pub fn supports(&self, nip: u16) -> bool {
        self.nips.as_ref().is_some_and(|nips| nips.contains(&nip))
    }
}

/// How TLS is spoken: read once, since the list of authorities has some hundred certificates.
fn tls() -> &'static Result<Arc<ClientConfig>, String> {
    static CONFIG: OnceLock<Result<Arc<ClientConfig>, String>> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(found.certs);
        if added == 0 {
            return Err(
                "this machine has no list of certificate authorities; install ca-certificates, or name a file \
                        of them in $SSL_CERT_FILE"
                    .to_owned(),
            );
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| error.to_string())?;
        Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Scheme, host and port, with the defaults of each scheme; the rest is refused by name.
    #[test]
    fn relay_urls_are_read() {
        for (text, secure, host, port) in [
            ("wss://relay.example.com", true, "relay.example.com", 443),
            (" ws://127.0.0.1:7777/ ", false, "127.0.0.1", 7777),
            ("ws://[::1]:80/path?x=1", false, "::1", 80),
            ("ws://localhost", false, "localhost", 80),
        ] {
            let url = RelayUrl::parse(text).unwrap();
            assert_eq!((url.secure, url.host.as_str(), url.port), (secure, host, port), "{text}");
            assert_eq!(url.as_str(), text.trim());
        }
        for text in ["", "relay.example.com", "https://relay.example.com", "ws://", "ws:///x", "wss://a b"] {
            assert!(RelayUrl::parse(text).unwrap_err().to_string().contains(text), "{text}");
        }
    }

    /// A document that lies about its types is one that says nothing.
    #[test]
    fn what_is_not_said_is_not_known() {
        let full = r#"{"supported_nips":[1,77,"x",70000],"sync":{"slots":1},"limitation":{"max_limit":5,"max_message_length":9}}"#;
        let about = About::read(&serde_json::from_str(full).unwrap());
        assert!(about.supports(77) && !about.supports(42) && about.slots);
        assert_eq!((about.limit_max, about.message_bytes_max), (Some(5), Some(9)));
        for nothing in ["[]", "null", r#"{"supported_nips":5,"sync":[],"limitation":"none"}"#] {
            assert_eq!(About::read(&serde_json::from_str(nothing).unwrap()), About::default(), "{nothing}");
        }
    }
}
