//! A relay whose every word the test writes, for what no honest relay can be brought to say.

use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};

use super::client::soon;

/// A listening fake; its connections are played by the test.
pub struct Fake {
    addr: SocketAddr,
    peers: mpsc::Receiver<FakePeer>,
    accepting: JoinHandle<()>,
}

impl Fake {
    /// Says `about` when asked for its information document.
    pub async fn start(about: Value) -> Fake {
        Fake::dated(about, None).await
    }

    /// Also gives this `Date` in every handshake.
    pub async fn dated(about: Value, date: Option<&'static str>) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("it listens");
        let (found, peers) = mpsc::channel(8);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Some(peer) = greet(stream, &about, date).await
                    && found.send(peer).await.is_err()
                {
                    return;
                }
            }
        });
        Fake { addr, peers, accepting }
    }

    pub fn url(&self) -> String {
        format!("ws://{}", self.addr)
    }

    /// The next WebSocket connection.
    pub async fn accept(&mut self) -> FakePeer {
        soon("a connection", self.peers.recv()).await.expect("the fake listens")
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn greet(stream: TcpStream, about: &Value, date: Option<&'static str>) -> Option<FakePeer> {
    let mut head = [0; 2048];
    let mut len = 0;
    while !head[..len].windows(4).any(|end| end == b"\r\n\r\n") {
        len = stream.peek(&mut head).await.ok().filter(|len| *len > 0)?;
    }
    if !String::from_utf8_lossy(&head[..len]).to_ascii_lowercase().contains("upgrade: websocket") {
        return tell_about(stream, &mut head[..len], about).await;
    }
    // The callback's type is the library's.
    #[allow(clippy::result_large_err)]
    let add_date = |_: &Request, mut response: Response| -> Result<Response, ErrorResponse> {
        if let Some(date) = date {
            response.headers_mut().insert("date", date.parse().expect("a header"));
        }
        Ok(response)
    };
    let socket = tokio_tungstenite::accept_hdr_async(stream, add_date).await.ok()?;
    Some(FakePeer { socket })
}

async fn tell_about(mut stream: TcpStream, request: &mut [u8], about: &Value) -> Option<FakePeer> {
    stream.read_exact(request).await.ok()?;
    let body = about.to_string();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).await.ok()?;
    None
}

/// The fake's end of one connection.
pub struct FakePeer {
    socket: WebSocketStream<TcpStream>,
}

impl FakePeer {
    pub async fn say(&mut self, message: Value) {
        self.say_raw(Message::text(message.to_string())).await;
    }

    pub async fn say_raw(&mut self, message: Message) {
        soon("the client to read", self.socket.send(message)).await.expect("the client is there");
    }

    /// The next message of the client; `None` once it has gone.
    pub async fn hear(&mut self) -> Option<Value> {
        loop {
            match soon("a message of the client", self.socket.next()).await {
                Some(Ok(Message::Text(text))) => return Some(serde_json::from_str(&text).expect("clients send JSON")),
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                Some(Ok(_)) => {}
            }
        }
    }

    /// The next message with this verb; others are passed over.
    pub async fn hear_verb(&mut self, verb: &str) -> Value {
        loop {
            let message = self.hear().await.unwrap_or_else(|| panic!("the client left instead of {verb}"));
            if message[0] == verb {
                return message;
            }
        }
    }

    /// Answers every question with nothing, up to the first event that is published; that one's JSON.
    pub async fn until_published(&mut self) -> Value {
        self.until_verb("EVENT").await[1].clone()
    }

    /// Answers every question with nothing, up to the first message with this verb.
    pub async fn until_verb(&mut self, verb: &str) -> Value {
        loop {
            let message = self.hear().await.unwrap_or_else(|| panic!("the client left instead of {verb}"));
            if message[0] == verb {
                return message;
            }
            self.answer_with_nothing(&message).await;
        }
    }

    /// Answers every question with nothing until something has happened. What is published meanwhile is not answered.
    pub async fn answer_until<T>(&mut self, done: impl Future<Output = T>) -> T {
        tokio::pin!(done);
        loop {
            let next = tokio::select! {
                done = &mut done => return done,
                next = self.socket.next() => next,
            };
            if let Some(Ok(Message::Text(text))) = next {
                self.answer_with_nothing(&serde_json::from_str(&text).expect("clients send JSON")).await;
            }
        }
    }

    async fn answer_with_nothing(&mut self, message: &Value) {
        if message[0] == "REQ" {
            self.say(serde_json::json!(["EOSE", message[1]])).await;
        }
    }

    /// Answers an event.
    pub async fn ok(&mut self, event: &Value, accepted: bool, text: &str) {
        self.say(serde_json::json!(["OK", event["id"], accepted, text])).await;
    }

    /// Cuts the connection without a goodbye.
    pub fn cut(self) {
        drop(self.socket);
    }

    /// Says goodbye.
    pub async fn close(mut self) {
        let _ = soon("the goodbye", self.socket.close(None)).await;
    }
}
