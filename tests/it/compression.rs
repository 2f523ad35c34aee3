//! Compressed messages (RFC 7692) through a real socket, by a client that packs and unpacks by hand: no library that these
//! tests use can.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::client::{request, soon};
use crate::support::{Keys, NOW, Relay, json_of};

const TAIL: [u8; 4] = [0, 0, 0xff, 0xff];
const COMPRESSED: u8 = 0x40;

/// A client that keeps its window, as one that was not told otherwise does.
struct Packed {
    stream: TcpStream,
    answer: String,
    window: Decompress,
    /// Compressed frames, and the bytes of all frames.
    compressed: usize,
    bytes: usize,
}

impl Packed {
    async fn connect(relay: &Relay, offer: &str) -> Packed {
        let mut stream = soon("the connection", TcpStream::connect(relay.addr())).await.unwrap();
        let head = format!(
            "GET / HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Extensions: {offer}\r\n\r\n",
            relay.addr()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(soon("the handshake", stream.read_u8()).await.unwrap());
        }
        let answer = String::from_utf8(answer).unwrap().to_ascii_lowercase();
        let mut client = Packed { stream, answer, window: Decompress::new(false), compressed: 0, bytes: 0 };
        assert_eq!(client.next().await[0], "AUTH");
        client
    }

    async fn send(&mut self, text: &str) {
        let mut packed = Vec::with_capacity(text.len() + 100);
        Compress::new(Compression::default(), false)
            .compress_vec(text.as_bytes(), &mut packed, FlushCompress::Sync)
            .unwrap();
        packed.truncate(packed.len() - TAIL.len());
        let len = u16::try_from(packed.len()).unwrap().to_be_bytes();
        let frame = [&[0x81 | COMPRESSED, 0x80 | 126, len[0], len[1], 0, 0, 0, 0][..], &packed].concat();
        self.stream.write_all(&frame).await.unwrap();
    }

    async fn next(&mut self) -> Value {
        let [first, second] = soon("a frame", read_array(&mut self.stream)).await;
        let len = match second {
            126 => u16::from_be_bytes(read_array(&mut self.stream).await).into(),
            127 => u64::from_be_bytes(read_array(&mut self.stream).await),
            len => len.into(),
        };
        let mut payload = vec![0; usize::try_from(len).unwrap()];
        soon("the payload", self.stream.read_exact(&mut payload)).await.unwrap();
        self.bytes += payload.len();
        if first & COMPRESSED != 0 {
            self.compressed += 1;
            payload.extend(TAIL);
            let mut text = Vec::with_capacity(1 << 20);
            self.window.decompress_vec(&payload, &mut text, FlushDecompress::Sync).unwrap();
            payload = text;
        }
        serde_json::from_slice(&payload).unwrap()
    }

    async fn query(&mut self, filter: Value) -> Vec<Value> {
        self.send(&request("REQ", "q", &[filter])).await;
        let mut events = Vec::new();
        loop {
            let message = self.next().await;
            match message[0].as_str() {
                Some("EVENT") => events.push(message[2].clone()),
                Some("EOSE") => return events,
                _ => panic!("{message}"),
            }
        }
    }
}

async fn read_array<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await.unwrap();
    bytes
}

/// Stored and live events arrive whole and shorter, with and without a shared context, beside clients that want none.
#[tokio::test]
async fn events_are_compressed_for_those_who_offer_it() {
    let relay = Relay::start().await;
    let keys = Keys::new(1);
    let notes: Vec<_> = (0..50).map(|n| keys.note(NOW + n, &format!("note {n} {}", "hello ".repeat(40)))).collect();
    let mut plain = relay.client().await;
    plain.store_all(&notes).await;
    let expected = plain.req("q", &[json!({})]).await.events;
    let mut sizes = Vec::new();
    for offer in ["permessage-deflate; client_max_window_bits", "permessage-deflate; server_no_context_takeover"] {
        let mut client = Packed::connect(&relay, offer).await;
        assert!(client.answer.contains("sec-websocket-extensions: permessage-deflate;"), "{}", client.answer);
        assert!(client.answer.contains("client_no_context_takeover"));
        assert!(client.query(json!({"until": NOW + 50})).await == expected, "the events are whole");
        assert_eq!(client.compressed, 50);
        sizes.push(client.bytes);
        // Live, then stored again: the window goes on.
        assert!(client.query(json!({"limit": 0})).await.is_empty());
        for n in 0..3 {
            let note = keys.note(NOW + 100 + n, &format!("live {offer} {}", "hello ".repeat(40)));
            client.send(&format!("[\"EVENT\",{}]", json_of(&note))).await;
            let (mut ok, mut live) = (false, false);
            while !(ok && live) {
                let message = client.next().await;
                match message[0].as_str() {
                    Some("OK") => ok = true,
                    Some("EVENT") => live = message[2]["id"] == note.id.to_hex(),
                    _ => panic!("{message}"),
                }
            }
            assert_eq!(plain.live("q").await["id"], note.id.to_hex());
        }
        assert_eq!(client.query(json!({"limit": 50})).await.len(), 50);
    }
    let bytes = expected.iter().map(|event| event.to_string().len()).sum::<usize>();
    assert!(sizes[0] < sizes[1] && sizes[1] * 3 < bytes * 2, "{sizes:?} of {bytes}");
}

/// A message that unpacks to more than a message may have ends its connection, and no other.
#[tokio::test]
async fn a_bomb_ends_its_connection() {
    let relay = Relay::with(|config| config.limits.frame_bytes_max = 65_536).await;
    let mut bystander = relay.client().await;
    let mut client = Packed::connect(&relay, "permessage-deflate").await;
    client.send(&format!("[\"REQ\",\"{}", " ".repeat(10_000_000))).await;
    let mut rest = Vec::new();
    soon("the end", client.stream.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.windows(2).any(|code| code == 1_009u16.to_be_bytes()), "{rest:?}");
    bystander.assert_alive().await;
}

/// Switched off, or offered in a way that cannot be met, messages go as they are.
#[tokio::test]
async fn nothing_is_agreed_on_where_it_cannot_be() {
    let relay = Relay::with(|config| config.limits.compress_messages = false).await;
    let client = Packed::connect(&relay, "permessage-deflate").await;
    assert!(!client.answer.contains("extensions"), "{}", client.answer);
    let relay = Relay::start().await;
    let client = Packed::connect(&relay, "permessage-deflate; server_max_window_bits=8").await;
    assert!(!client.answer.contains("extensions"), "{}", client.answer);
}
