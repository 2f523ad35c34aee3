//! A WebSocket client that speaks raw text, so that tests can say what no library would.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use sledge::protocol::Event;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::relay::SERVICE_URL;
use super::{Keys, NOW, json_of};

/// Ends a test that waits for something that does not come. Far above what any answer takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Awaits `future`; fails the test when it does not finish.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// One connection to a relay. Messages that a helper does not wait for are kept for the next one, in order.
pub struct Client {
    socket: WebSocketStream<TcpStream>,
    /// What the relay asked to be signed when the connection began (NIP-42).
    pub challenge: String,
    held: VecDeque<Value>,
}

/// What a REQ brought before its end.
#[derive(Debug, PartialEq)]
pub struct Stored {
    pub events: Vec<Value>,
    /// The hints of NIP-67, none when EOSE carried no third element.
    pub hints: Vec<String>,
}

impl Stored {
    /// The events' ids, in the order they came.
    pub fn ids(&self) -> Vec<String> {
        self.events.iter().map(|event| event["id"].as_str().expect("an event has an id").to_owned()).collect()
    }
}

impl Client {
    pub async fn connect(addr: SocketAddr) -> Client {
        Client::connect_as(addr, &format!("ws://{addr}/")).await
    }

    /// Connects to `addr` in the belief that it is `url`.
    pub async fn connect_as(addr: SocketAddr, url: &str) -> Client {
        Client::connect_with(addr, url).await
    }

    /// As somebody whom a reverse proxy on this machine forwards.
    pub async fn connect_from(addr: SocketAddr, ip: &str) -> Client {
        Client::try_connect_from(addr, ip).await.expect("the relay speaks WebSocket")
    }

    /// As [`Client::connect_from`], where the relay may refuse.
    pub async fn try_connect_from(addr: SocketAddr, ip: &str) -> Result<Client, Error> {
        let mut request = format!("ws://{addr}/").into_client_request()?;
        request.headers_mut().insert("x-forwarded-for", ip.parse().expect("a header value"));
        Client::try_connect_with(addr, request).await
    }

    /// Connects to `addr` with this request.
    pub async fn connect_with(addr: SocketAddr, request: impl IntoClientRequest + Unpin) -> Client {
        Client::try_connect_with(addr, request).await.expect("the relay speaks WebSocket")
    }

    /// As [`Client::connect_with`], where the relay may refuse.
    async fn try_connect_with(addr: SocketAddr, request: impl IntoClientRequest + Unpin) -> Result<Client, Error> {
        let stream = soon("the connection", TcpStream::connect(addr)).await.expect("the relay listens");
        stream.set_nodelay(true).expect("a socket option");
        // The tests send frames that are too large on purpose; only the relay's limits are under test.
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let handshake = tokio_tungstenite::client_async_with_config(request, stream, Some(config));
        let (mut socket, _) = soon("the handshake", handshake).await?;
        // A relay that is killed at this moment says nothing; the test will notice.
        let greeting = match soon("the challenge", socket.next()).await {
            Some(Ok(Message::Text(text))) => serde_json::from_str(&text).expect("the relay sends JSON"),
            _ => Value::Null,
        };
        assert!(greeting.is_null() || greeting[0] == "AUTH", "the first message is {greeting}");
        let challenge = greeting[1].as_str().unwrap_or_default().to_owned();
        Ok(Client { socket, challenge, held: VecDeque::new() })
    }

    /// Sends an AUTH event; the flag and text of its OK.
    pub async fn auth(&mut self, event: &Event) -> (bool, String) {
        self.send(format!("[\"AUTH\",{}]", json_of(event))).await;
        self.ok_for(&event.id.to_hex()).await
    }

    /// Authenticates with a key, as the relays of these tests are known and at the time that they start with.
    pub async fn prove(&mut self, keys: &Keys) {
        let answer = self.auth(&keys.auth(&self.challenge, SERVICE_URL, NOW)).await;
        assert_eq!(answer, (true, String::new()));
    }

    pub async fn send(&mut self, text: impl Into<String>) {
        self.send_message(Message::text(text.into())).await;
    }

    pub async fn send_message(&mut self, message: Message) {
        soon("the relay to read", self.socket.send(message)).await.expect("the connection lives");
    }

    /// As [`Client::send_message`], for messages that the relay may answer by closing.
    pub async fn try_send(&mut self, message: Message) -> Result<(), Error> {
        soon("the relay to read", self.socket.send(message)).await
    }

    /// The next frame that is neither ping nor pong; `None` once the connection is over.
    pub async fn next_frame(&mut self) -> Option<Message> {
        loop {
            match soon("a frame", self.socket.next()).await {
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                Some(Ok(message)) => return Some(message),
            }
        }
    }

    /// Any next frame, pings and pongs too.
    pub async fn next_raw(&mut self) -> Option<Result<Message, Error>> {
        soon("a frame", self.socket.next()).await
    }

    /// The next message; one that was kept comes first.
    pub async fn next(&mut self) -> Value {
        match self.held.pop_front() {
            Some(message) => message,
            None => self.receive().await,
        }
    }

    async fn receive(&mut self) -> Value {
        let frame = self.next_frame().await.expect("the connection lives");
        let text = frame.into_text().expect("the relay sends text");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("the relay sent no JSON ({error}): {text}"))
    }

    /// Reads until `wanted` holds for a message; the others are kept.
    pub async fn wait_for(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        if let Some(at) = self.held.iter().position(&wanted) {
            return self.held.remove(at).expect("the position is from this queue");
        }
        loop {
            let message = self.receive().await;
            if wanted(&message) {
                return message;
            }
            self.held.push_back(message);
        }
    }

    /// Publishes and gives the flag and text of the OK.
    pub async fn publish(&mut self, event: &Event) -> (bool, String) {
        self.publish_raw(&json_of(event), &event.id.to_hex()).await
    }

    /// Publishes event JSON as it is; the OK is expected for `id`.
    pub async fn publish_raw(&mut self, event_json: &str, id: &str) -> (bool, String) {
        self.send(format!("[\"EVENT\",{event_json}]")).await;
        self.ok_for(id).await
    }

    /// Waits for the OK about `id`.
    pub async fn ok_for(&mut self, id: &str) -> (bool, String) {
        let answer = self.wait_for(|message| message[0] == "OK" && message[1] == id).await;
        let accepted = answer[2].as_bool().expect("OK has a flag");
        let text = answer[3].as_str().expect("OK has a text").to_owned();
        assert!(text.is_empty() && accepted || has_standard_prefix(&text), "{answer}");
        (accepted, text)
    }

    /// Publishes what must be stored.
    pub async fn store(&mut self, event: &Event) {
        assert_eq!(self.publish(event).await, (true, String::new()), "{}", json_of(event));
    }

    /// Publishes many at once and waits for all answers; all must be stored.
    pub async fn store_all<'e>(&mut self, events: impl IntoIterator<Item = &'e Event>) {
        let events: Vec<&Event> = events.into_iter().collect();
        for chunk in events.chunks(100) {
            for event in chunk {
                self.send(format!("[\"EVENT\",{}]", json_of(event))).await;
            }
            for event in chunk {
                assert_eq!(self.ok_for(&event.id.to_hex()).await, (true, String::new()));
            }
        }
    }

    /// Sends a REQ and does not wait.
    pub async fn subscribe(&mut self, id: &str, filters: &[Value]) {
        self.send(request("REQ", id, filters)).await;
    }

    /// Sends a REQ and collects what is stored, up to EOSE. The subscription stays open.
    pub async fn req(&mut self, id: &str, filters: &[Value]) -> Stored {
        self.subscribe(id, filters).await;
        self.until_eose(id).await
    }

    /// As [`Client::req`] with one filter, and the subscription is closed afterwards.
    pub async fn query(&mut self, filter: Value) -> Stored {
        let stored = self.req("query", &[filter]).await;
        self.close("query").await;
        stored
    }

    /// The ids of stored events that match, in the order they came.
    pub async fn query_ids(&mut self, filter: Value) -> Vec<String> {
        self.query(filter).await.ids()
    }

    /// Collects the events of `id` up to its EOSE.
    pub async fn until_eose(&mut self, id: &str) -> Stored {
        let mut events = Vec::new();
        loop {
            let message = self.wait_for(|message| message[1] == id && message[0] != "OK").await;
            match message[0].as_str() {
                Some("EVENT") => events.push(message[2].clone()),
                Some("EOSE") => return Stored { events, hints: hints(&message) },
                _ => panic!("instead of EOSE came {message}"),
            }
        }
    }

    /// Sends a REQ that must be refused at once; the text of its CLOSED.
    pub async fn refused(&mut self, id: &str, filters: &[Value]) -> String {
        self.subscribe(id, filters).await;
        self.closed(id).await
    }

    /// The text of the CLOSED that must be the next message of `id`.
    pub async fn closed(&mut self, id: &str) -> String {
        let message = self.wait_for(|message| message[1] == id && message[0] != "OK").await;
        assert_eq!(message[0], "CLOSED", "instead of CLOSED came {message}");
        let text = message[2].as_str().expect("CLOSED has a text").to_owned();
        assert!(has_standard_prefix(&text), "{message}");
        text
    }

    /// Sends CLOSE.
    pub async fn close(&mut self, id: &str) {
        self.send(json!(["CLOSE", id]).to_string()).await;
    }

    /// Drops what was kept for a subscription that is over.
    pub fn forget(&mut self, id: &str) {
        self.held.retain(|message| message[1] != id);
    }

    /// The body of the COUNT answer.
    pub async fn count_body(&mut self, filters: &[Value]) -> Value {
        self.send(request("COUNT", "count", filters)).await;
        let answer = self.wait_for(|message| message[1] == "count" && message[0] != "OK").await;
        assert_eq!(answer[0], "COUNT", "instead of COUNT came {answer}");
        answer[2].clone()
    }

    /// How many stored events match.
    pub async fn count(&mut self, filters: &[Value]) -> u64 {
        self.count_body(filters).await["count"].as_u64().expect("COUNT has a count")
    }

    /// The next event on `subscription`, whose EOSE was read before.
    pub async fn live(&mut self, subscription: &str) -> Value {
        let message = self.wait_for(|message| message[1] == subscription && message[0] != "OK").await;
        assert_eq!(message[0], "EVENT", "instead of an event came {message}");
        message[2].clone()
    }

    /// All live events of `subscription` up to the one with `last_id`, that one left out.
    pub async fn live_before(&mut self, subscription: &str, last_id: &str) -> Vec<String> {
        let mut before = Vec::new();
        loop {
            let event = self.live(subscription).await;
            let id = event["id"].as_str().expect("an event has an id");
            if id == last_id {
                return before;
            }
            before.push(id.to_owned());
        }
    }

    /// What arrives up to the answer of a COUNT asked now: the relay answers a connection in order, so whatever it
    /// had to say before is in here.
    pub async fn drain(&mut self) -> Vec<Value> {
        self.send(request("COUNT", "drain", &[json!({"ids": []})])).await;
        let mut arrived: Vec<Value> = self.held.drain(..).collect();
        loop {
            let message = self.receive().await;
            if message[0] == "COUNT" && message[1] == "drain" {
                return arrived;
            }
            arrived.push(message);
        }
    }

    /// Whether the relay still answers on this connection.
    pub async fn assert_alive(&mut self) {
        self.count(&[json!({"ids": []})]).await;
    }

    /// Reads until the connection is over.
    pub async fn assert_closed(&mut self) {
        while self.next_frame().await.is_some() {}
    }

    /// The stream underneath, for bytes that no WebSocket library writes.
    pub fn stream(&mut self) -> &mut TcpStream {
        self.socket.get_mut()
    }
}

/// `[verb, id, filter…]`.
pub fn request(verb: &str, id: &str, filters: &[Value]) -> String {
    let mut message = vec![json!(verb), json!(id)];
    message.extend_from_slice(filters);
    Value::Array(message).to_string()
}

/// Whether a refusal starts as NIP-01 and NIP-42 say (T27); `unsupported` is NIP-01's word for filters, `info` NIP-43's
/// for a welcome.
pub fn has_standard_prefix(text: &str) -> bool {
    let known = [
        "duplicate",
        "pow",
        "blocked",
        "rate-limited",
        "invalid",
        "restricted",
        "mute",
        "error",
        "auth-required",
        "unsupported",
        "info",
    ];
    text.split_once(": ").is_some_and(|(prefix, reason)| known.contains(&prefix) && !reason.is_empty())
}

fn hints(eose: &Value) -> Vec<String> {
    let Some(list) = eose.get(2) else { return Vec::new() };
    let list = list.as_array().expect("NIP-67 hints are an array");
    list.iter().map(|hint| hint.as_str().expect("a hint is a string").to_owned()).collect()
}
