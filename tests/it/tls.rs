//! The encrypted port: the same relay, by a client that checks the certificate; a renewed one is used without a restart.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::Message;

use crate::support::client::soon;
use crate::support::{Binary, Keys, NOW, Serving, json_of};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/fixtures/tls").join(name)
}

/// Shakes hands, trusting the authority of the fixtures only; what certificate was shown.
async fn connect(addr: SocketAddr) -> (TlsStream<TcpStream>, Vec<u8>) {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(fixture("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let socket = soon("the connection", TcpStream::connect(addr)).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = soon("TLS", TlsConnector::from(Arc::new(config)).connect(name, socket)).await.unwrap();
    let shown = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    (stream, shown)
}

/// A relay with the certificate `one` in files that may be changed.
pub fn encrypted(binary: &Binary) -> (Serving, SocketAddr) {
    let certificate = binary.file("cert.pem", std::fs::read(fixture("one.pem")).unwrap());
    let key = binary.file("key.pem", std::fs::read(fixture("one.key")).unwrap());
    binary.configure(&format!("[tls]\nlisten = \"127.0.0.1:0\"\ncertificate = \"{certificate}\"\nkey = \"{key}\"\n"));
    let relay = binary.serve();
    let line = relay.wait_for_line("TLS is spoken");
    let addr = line.split("addr=").nth(1).unwrap().trim().parse().unwrap();
    (relay, addr)
}

/// Publishing and reading through TLS; the page names the encrypted address; the plain port stays.
#[tokio::test]
async fn the_relay_speaks_tls() {
    let binary = Binary::new();
    let (relay, addr) = encrypted(&binary);
    let (stream, _) = connect(addr).await;
    let url = format!("ws://localhost:{}/", addr.port());
    let (mut socket, _) = soon("the handshake", tokio_tungstenite::client_async(url, stream)).await.unwrap();
    let note = Keys::new(1).note(NOW, &"x".repeat(100_000));
    socket.send(Message::text(format!("[\"EVENT\",{}]", json_of(&note)))).await.unwrap();
    socket.send(Message::text("[\"REQ\",\"s\",{\"limit\":1}]")).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let message = soon("a message", socket.next()).await.unwrap().unwrap();
        let message: serde_json::Value = serde_json::from_str(message.to_text().unwrap()).unwrap();
        seen.push(message[0].as_str().unwrap().to_owned());
    }
    assert_eq!(seen, ["AUTH", "OK", "EVENT", "EOSE"]);
    let (mut stream, _) = connect(addr).await;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: relay.example.com\r\nAccept: text/html\r\n\r\n").await.unwrap();
    let mut page = String::new();
    soon("the page", stream.read_to_string(&mut page)).await.unwrap();
    assert!(page.contains("wss://relay.example.com"), "{page}");
    crate::support::Client::connect(relay.addr()).await.assert_alive().await;
}

/// New files are noticed; a wrong one leaves the old certificate in use. What speaks no TLS on that port harms nobody.
#[tokio::test]
async fn a_renewed_certificate_is_used() {
    let binary = Binary::new();
    let (relay, addr) = encrypted(&binary);
    let (_open, first) = connect(addr).await;
    let mut plain = TcpStream::connect(addr).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = soon("the end", plain.read_to_end(&mut answer)).await;
    binary.file("cert.pem", "nonsense");
    relay.wait_for_line("the old certificate stays in use");
    assert_eq!(connect(addr).await.1, first);
    binary.file("key.pem", std::fs::read(fixture("two.key")).unwrap());
    binary.file("cert.pem", std::fs::read(fixture("two.pem")).unwrap());
    relay.wait_for_line("the renewed certificate is in use");
    let (_, second) = connect(addr).await;
    assert_ne!(first, second);
}

/// The encrypted port is passed on like the plain one: nobody who connects meanwhile is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_takes_the_encrypted_port_over() {
    let binary = Binary::new();
    let (old, addr) = encrypted(&binary);
    let plain = old.addr();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let asking = tokio::spawn(async move {
        let mut asked = 0;
        while stopped.try_recv() != Err(std::sync::mpsc::TryRecvError::Disconnected) {
            connect(addr).await;
            asked += 1;
        }
        asked
    });
    let take_over = || binary.serve_with(&["--take-over", "--listen", &plain.to_string()], &[]);
    let new = tokio::task::block_in_place(take_over);
    let line = new.wait_for_line("TLS is spoken");
    assert!(line.contains(&addr.to_string()), "{line}");
    assert!(old.wait_for_end().0.success());
    connect(addr).await;
    drop(stop);
    assert!(asking.await.unwrap() > 0);
}
