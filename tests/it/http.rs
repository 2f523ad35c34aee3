//! Plain HTTP on the relay's port: the landing page, health, and what is no request at all.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::client::soon;
use crate::support::{Keys, NOW, Relay};

/// A response, read to the end of the connection.
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Sends one request by hand and reads the response.
pub async fn request(addr: SocketAddr, line: &str, headers: &[&str]) -> Response {
    let mut stream = TcpStream::connect(addr).await.expect("the relay listens");
    let mut text = format!("{line}\r\nHost: {addr}\r\nConnection: close\r\n");
    headers.iter().for_each(|header| text += &format!("{header}\r\n"));
    stream.write_all((text + "\r\n").as_bytes()).await.expect("the relay reads");
    let mut answer = String::new();
    soon("the response", stream.read_to_string(&mut answer)).await.expect("the response is text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a response has a head");
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
    let header = |line: &str| {
        let (name, value) = line.split_once(':').expect("a header has a colon");
        (name.to_ascii_lowercase(), value.trim().to_owned())
    };
    Response { status: status.expect("a status line"), headers: lines.map(header).collect(), body: body.to_owned() }
}

/// A browser gets a page that says what this is.
#[tokio::test]
async fn a_browser_gets_a_landing_page() {
    let relay = Relay::with(|config| config.info.name = "Tea & <Biscuits>".to_owned()).await;
    let response =
        request(relay.addr(), "GET / HTTP/1.1", &["Accept: text/html,application/xhtml+xml,*/*;q=0.8"]).await;
    assert_eq!(response.status, 200);
    assert!(response.header("content-type").is_some_and(|kind| kind.starts_with("text/html")));
    assert!(response.body.contains("Tea &amp; &lt;Biscuits&gt;"), "the name is escaped: {}", response.body);
    assert!(!response.body.contains("<Biscuits>"));
}

/// Health is a cheap 200; unknown paths and methods are answered, not dropped.
#[tokio::test]
async fn health_and_unknown_paths() {
    let relay = Relay::start().await;
    assert_eq!(request(relay.addr(), "GET /healthz HTTP/1.1", &[]).await.status, 200);
    assert_eq!(request(relay.addr(), "GET /no/such/page HTTP/1.1", &[]).await.status, 404);
    let post = request(relay.addr(), "DELETE / HTTP/1.1", &[]).await.status;
    assert!(post == 405 || post == 404, "{post}");
    let head = request(relay.addr(), "HEAD / HTTP/1.1", &[]).await;
    assert!(head.status == 200 || head.status == 405, "{}", head.status);
    assert_eq!(head.body, "");
}

/// An upgrade that is not one of WebSocket's gets an HTTP answer, and the relay goes on.
#[tokio::test]
async fn broken_upgrades_are_answered() {
    let relay = Relay::start().await;
    let upgrade = ["Upgrade: websocket", "Connection: Upgrade"];
    for headers in [
        &[upgrade[0], upgrade[1]] as &[&str],
        &[upgrade[0], upgrade[1], "Sec-WebSocket-Version: 13"],
        &[upgrade[0], upgrade[1], "Sec-WebSocket-Version: 8", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="],
    ] {
        let status = request(relay.addr(), "GET / HTTP/1.1", headers).await.status;
        assert!((400..500).contains(&status), "{headers:?}: {status}");
    }
    relay.client().await.store(&Keys::new(1).note(NOW, "")).await;
}
