//! A relay behind TLS: reached when an authority that the machine knows stands for it, and refused otherwise.
//!
//! `fixtures/tls` has an authority made for tests, whose key is gone, and a certificate of it for `localhost`.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::client_crash::laptop;
use super::support::Relay;
use super::support::device::today;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/fixtures/tls").join(name)
}

/// Speaks TLS on a port of its own and passes everything on to `relay`.
async fn tls_proxy(relay: std::net::SocketAddr) -> std::net::SocketAddr {
    let chain = CertificateDer::pem_file_iter(fixture("one.pem")).unwrap().collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(fixture("one.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(chain, key).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = TlsAcceptor::from(Arc::new(config.clone()));
            tokio::spawn(async move {
                // A client that does not trust us leaves here.
                if let Ok(mut inside) = acceptor.accept(socket).await {
                    let mut outside = TcpStream::connect(relay).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
                }
            });
        }
    });
    addr
}

/// Written on one laptop over TLS, read on another over TLS; a laptop that does not know the authority says so and keeps
/// what it wrote.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_behind_tls_is_reached_if_it_is_trusted() {
    let relay = Relay::with(|config| config.service_url = String::new()).await;
    relay.set_now(today());
    let url = format!("wss://localhost:{}", tls_proxy(relay.addr()).await.port());
    let commands = tokio::task::spawn_blocking(move || {
        let [writer, reader] = [(), ()].map(|()| laptop(std::slice::from_ref(&url)));
        let trusting = |laptop: &super::support::Binary, args: &[&str]| {
            let output = laptop.command(args).env("SSL_CERT_FILE", fixture("ca.pem")).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        writer.run(&["chat", "new", "Lisbon", "--offline"]).ok();
        // An authority that stands for nobody here: the certificate itself is none.
        let distrusting =
            writer.command(&["outbox", "flush"]).env("SSL_CERT_FILE", fixture("two.pem")).output().unwrap();
        let complaint = String::from_utf8_lossy(&distrusting.stderr).to_lowercase();
        assert!(!distrusting.status.success() && complaint.contains("certificate"), "{complaint}");
        trusting(&writer, &["outbox", "flush"]);
        assert!(trusting(&reader, &["chat", "list"]).contains("Lisbon"));
    });
    commands.await.unwrap();
}
