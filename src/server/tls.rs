//! TLS by rustls: the certificate is read from files, and again when they change, so that a renewed one is used without a
//! restart. Connections keep the one that they began with.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::socket::Socket;
use crate::config;

/// Speaks TLS with a certificate from files.
#[derive(Debug)]
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    config: ArcSwap<ServerConfig>,
    /// The versions of the files that were looked at last.
    seen: Mutex<Stamps>,
}

/// When the certificate and the key were written.
type Stamps = [Option<SystemTime>; 2];

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One of them cannot be read, or is no PEM.
    #[error("{0}: {1}")]
    File(String, rustls::pki_types::pem::Error),
    /// They do not go together, or are of a kind that rustls does not take.
    #[error("certificate and key cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
    /// There is no certificate in the file.
    #[error("{0} holds no certificate")]
    Empty(String),
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn new(settings: &config::Tls) -> Result<Tls, TlsError> {
        let (certificate, key) = (PathBuf::from(&settings.certificate), PathBuf::from(&settings.key));
        let seen = Mutex::new(stamps(&certificate, &key));
        let config = ArcSwap::new(load(&certificate, &key)?);
        Ok(Tls { certificate, key, config, seen })
    }

    /// Reads the files again if they have changed; whether they had. One that is wrong leaves the old certificate in
    /// use, and is not looked at again before it changes.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn reload(&self) -> Result<bool, TlsError> {
        let now = stamps(&self.certificate, &self.key);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *seen, now) == now || now.contains(&None) {
            return Ok(false);
        }
        drop(seen);
        self.config.store(load(&self.certificate, &self.key)?);
        Ok(true)
    }

    /// Shakes hands with a client.
    ///
    /// # Errors
    /// When it speaks something else, or goes away.
    pub async fn accept(&self, socket: TcpStream) -> io::Result<Socket> {
        let stream = TlsAcceptor::from(self.config.load_full()).accept(socket).await?;
        Ok(Socket::Tls(Box::new(stream)))
    }
}

fn stamps(certificate: &Path, key: &Path) -> Stamps {
    [certificate, key].map(|file| std::fs::metadata(file).and_then(|meta| meta.modified()).ok())
}

fn load(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let name = |file: &Path| file.display().to_string();
    let failed = |file: &Path| {
        let name = name(file);
        |error| TlsError::File(name, error)
    };
    let chain = CertificateDer::pem_file_iter(certificate).map_err(failed(certificate))?;
    let chain: Vec<_> = chain.collect::<Result<_, _>>().map_err(failed(certificate))?;
    if chain.is_empty() {
        return Err(TlsError::Empty(name(certificate)));
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(failed(key))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/fixtures/tls").join(name)
    }

    /// Files that go together are taken; others are named, and what was good stays in use.
    #[test]
    fn files_are_read_and_named_when_they_are_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let settings = config::Tls {
            listen: String::new(),
            certificate: dir.path().join("cert.pem").display().to_string(),
            key: dir.path().join("key.pem").display().to_string(),
        };
        let error = || Tls::new(&settings).unwrap_err().to_string();
        assert!(error().contains("cert.pem"), "{}", error());
        std::fs::write(&settings.certificate, "no certificate\n").unwrap();
        assert!(error().contains("cert.pem holds no certificate"), "{}", error());
        std::fs::copy(fixture("one.pem"), &settings.certificate).unwrap();
        assert!(error().contains("key.pem"), "{}", error());
        std::fs::copy(fixture("two.key"), &settings.key).unwrap();
        assert!(error().starts_with("certificate and key cannot be used"), "{}", error());
        std::fs::copy(fixture("one.key"), &settings.key).unwrap();
        let tls = Tls::new(&settings).unwrap();
        assert!(!tls.reload().unwrap(), "nothing has changed");
        let old = tls.config.load_full();
        std::fs::remove_file(&settings.certificate).unwrap();
        assert!(!tls.reload().unwrap(), "a file that is being replaced may be missing for a moment");
        assert!(Arc::ptr_eq(&old, &tls.config.load_full()));
    }
}
