//! Clients that do much of what is allowed: each costs its own connection, memory stays bounded, and others are served.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use crate::support::client::{request, soon};
use crate::support::{Client, Keys, NOW, Relay, json_of};

/// Handshakes that come drop by drop are cut off after their time, and do not keep others from shaking hands.
#[tokio::test]
async fn slow_loris_handshakes_are_cut_off() {
    let relay = Relay::with(|config| config.limits.handshake_timeout_ms = 500).await;
    let mut slow = Vec::new();
    for _ in 0..200 {
        let mut socket = TcpStream::connect(relay.addr()).await.unwrap();
        socket.write_all(b"GET / HTTP/1.1\r\nX-Slow: ").await.unwrap();
        slow.push(socket);
    }
    relay.client().await.store(&Keys::new(1).note(NOW, "")).await;
    for mut socket in slow {
        let mut rest = Vec::new();
        // Cut off: the end of the stream, or a reset.
        let _ = soon("the end of a slow handshake", socket.read_to_end(&mut rest)).await;
    }
    relay.client().await.assert_alive().await;
}

/// A message in fragments of one byte is one message; one that goes on for ever ends at the limit.
#[tokio::test]
async fn fragments_of_one_byte() {
    let relay = Relay::with(|config| config.limits.frame_bytes_max = 16_384).await;
    let mut bystander = relay.client().await;
    let mut client = relay.client().await;
    let note = Keys::new(1).note(NOW, &"x".repeat(5_000));
    let text = format!("[\"EVENT\",{}]", json_of(&note));
    for (at, byte) in text.bytes().enumerate() {
        let kind = if at == 0 { Data::Text } else { Data::Continue };
        let frame = Frame::message(vec![byte], OpCode::Data(kind), at + 1 == text.len());
        client.send_message(Message::Frame(frame)).await;
    }
    assert_eq!(client.ok_for(&note.id.to_hex()).await, (true, String::new()));
    for at in 0..20_000 {
        let kind = if at == 0 { Data::Text } else { Data::Continue };
        let frame = Frame::message(vec![b' '], OpCode::Data(kind), false);
        if client.try_send(Message::Frame(frame)).await.is_err() {
            break;
        }
    }
    client.assert_closed().await;
    bystander.assert_alive().await;
}

/// Pings without end, by a client that reads no pongs: the relay stops reading it and holds a bounded answer; when the
/// client reads, all its pongs are there.
#[tokio::test]
async fn a_ping_flood_is_answered_in_bounded_memory() {
    let relay = Relay::start().await;
    let mut bystander = relay.client().await;
    let mut flood = TcpStream::connect(relay.addr()).await.unwrap();
    let handshake = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
                     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    flood.write_all(handshake.as_bytes()).await.unwrap();
    let (mut read, mut write) = flood.into_split();
    let ping = [&[0x89, 0x80 | 100, 0, 0, 0, 0][..], &[7; 100]].concat();
    const PINGS: usize = 100_000;
    let writing = tokio::spawn(async move {
        for _ in 0..PINGS / 1_000 {
            write.write_all(&ping.repeat(1_000)).await.unwrap();
        }
        write
    });
    for n in 0..20 {
        bystander.store(&Keys::new(1).note(NOW + n, "")).await;
    }
    // Each pong has 102 bytes; the handshake's answer and the challenge come first.
    let mut left = PINGS * 102;
    let mut buffer = vec![0; 64 * 1024];
    while left > 0 {
        let len = soon("pongs", read.read(&mut buffer)).await.unwrap();
        assert!(len > 0, "the connection lives");
        left = left.saturating_sub(len);
    }
    drop(writing.await.unwrap());
    bystander.assert_alive().await;
}

/// The same subscription id thousands of times: one subscription is left, the last one, and it works.
#[tokio::test]
async fn a_storm_of_replaced_requests() {
    let relay = Relay::start().await;
    let note = Keys::new(1).note(NOW, "stored");
    let mut bystander = relay.client().await;
    bystander.store(&note).await;
    let mut client = relay.client().await;
    for n in 0..5_000 {
        client.subscribe("s", &[json!({"kinds": [1], "since": n})]).await;
    }
    client.subscribe("last", &[json!({"ids": [note.id.to_hex()]})]).await;
    assert_eq!(client.until_eose("last").await.ids(), [note.id.to_hex()]);
    client.forget("s");
    let live = Keys::new(1).note(NOW + 1, "live");
    bystander.store(&live).await;
    // It follows the stored events of the last of them, whose turn comes when it comes.
    let is_live = |message: &Value| message[0] == "EVENT" && message[2]["id"] == live.id.to_hex();
    client.wait_for(is_live).await;
    let arrived = client.drain().await;
    assert!(!arrived.iter().any(is_live), "one subscription is open under that id");
}

/// Ten thousand messages of garbage from this machine, which is exempt from limits: each is answered, others are served.
#[tokio::test]
async fn a_flood_of_garbage_is_answered() {
    let relay = Relay::start().await;
    let mut bystander = relay.client().await;
    let mut client = relay.client().await;
    const MESSAGES: usize = 10_000;
    for round in 0..10 {
        for n in 0..MESSAGES / 10 {
            client.send(format!("{{garbage {n}")).await;
        }
        for _ in 0..MESSAGES / 10 {
            assert_eq!(client.next().await[0], "NOTICE");
        }
        bystander.store(&Keys::new(1).note(NOW + round, "")).await;
    }
    client.assert_alive().await;
}

/// One address has a bounded number of places, the next address its own.
#[tokio::test]
async fn one_address_does_not_take_all_places() {
    let relay = Relay::with(|config| config.limits.connections_per_ip_max = 8).await;
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(Client::connect_from(relay.addr(), "2001:db8::1").await);
    }
    assert!(Client::try_connect_from(relay.addr(), "2001:db8::2").await.is_err(), "the same /64");
    Client::connect_from(relay.addr(), "2001:db8:0:1::1").await.assert_alive().await;
    // A place is free again once its connection has ended.
    held.pop().unwrap().try_send(Message::Close(None)).await.unwrap();
    let mut again = None;
    while again.is_none() {
        again = Client::try_connect_from(relay.addr(), "2001:db8::2").await.ok();
    }
    again.unwrap().send(request("REQ", "s", &[json!({})])).await;
}
