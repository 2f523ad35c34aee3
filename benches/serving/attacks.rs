//! Loads beside the light client: heavy questions that are allowed, and what hostile clients do.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use crate::served::{Served, Socket, ask};
use crate::support;

/// Clients who ask heavy questions at the same time.
const HEAVY_CLIENTS: usize = 8;
/// Sockets of an attack that holds many.
const MANY_SOCKETS: usize = 300;
/// How long an attacker rests who was turned away.
const TURNED_AWAY: Duration = Duration::from_millis(20);

/// Hands out addresses, so that no attack is stopped by the ban of the one before it.
static ADDRESSES: AtomicUsize = AtomicUsize::new(0);

fn address() -> String {
    let number = ADDRESSES.fetch_add(1, Ordering::Relaxed);
    format!("203.0.{}.{}", number / 250 % 250, number % 250)
}

/// Asks one question after the other on several connections that no limit holds back.
fn heavy(served: &Served, stop: &AtomicBool, filter: impl Fn(usize) -> String + Sync) {
    std::thread::scope(|scope| {
        for client in 0..HEAVY_CLIENTS {
            let filter = &filter;
            scope.spawn(move || {
                let mut socket = served.client(None).unwrap();
                let mut number = client;
                while !stop.load(Ordering::Relaxed) && ask(&mut socket, "heavy", &filter(number)).is_some() {
                    number += HEAVY_CLIENTS;
                }
            });
        }
    });
}

fn authors(count: usize) -> String {
    let keys = (0..count).map(|number| format!("\"{}\"", support::pubkey(&support::author(number)).to_hex()));
    keys.collect::<Vec<_>>().join(",")
}

pub fn many_authors(served: &Served, stop: Arc<AtomicBool>) {
    let authors = authors(support::AUTHORS);
    heavy(served, &stop, |_| format!("{{\"authors\":[{authors}],\"limit\":5000}}"));
}

pub fn deep_until(served: &Served, stop: Arc<AtomicBool>) {
    heavy(served, &stop, |number| {
        let until = support::START + 20_000 + number as u64 % 100 * 1_000;
        format!("{{\"until\":{until},\"limit\":5000}}")
    });
}

/// Every note of many authors is looked at, and none has the topic.
pub fn fruitless_scans(served: &Served, stop: Arc<AtomicBool>) {
    heavy(served, &stop, |_| {
        format!("{{\"kinds\":[0,1,7],\"since\":{},\"#t\":[\"topic1\"],\"#e\":[\"{}\"]}}", 1, "ab".repeat(32))
    });
}

/// Does this again and again on a connection from outside; a new one, of a new address, whenever it is cut off.
fn attack(served: &Served, stop: &AtomicBool, act: impl Fn(&mut Socket) -> bool) {
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut socket) = served.client(Some(&address())) else {
            std::thread::sleep(TURNED_AWAY);
            continue;
        };
        socket.get_ref().set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        socket.get_ref().set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        while !stop.load(Ordering::Relaxed) && act(&mut socket) {}
    }
}

/// Whether it could be sent, after what has come was read.
fn send(socket: &mut Socket, message: Message) -> bool {
    while let Ok(read) = socket.read() {
        if matches!(read, Message::Close(_)) {
            return false;
        }
    }
    socket.send(message).is_ok()
}

/// Whether all of them could be sent.
fn send_all(socket: &mut Socket, messages: impl Iterator<Item = Message>) -> bool {
    let mut messages = messages.peekable();
    while let Some(message) = messages.next() {
        let sent = if messages.peek().is_none() { send(socket, message) } else { socket.write(message).is_ok() };
        if !sent {
            return false;
        }
    }
    true
}

pub fn slow_handshakes(served: &Served, stop: Arc<AtomicBool>) {
    let mut sockets: Vec<TcpStream> = (0..MANY_SOCKETS).map(|_| served.tcp()).collect();
    while !stop.load(Ordering::Relaxed) {
        for socket in &mut sockets {
            if socket.write_all(b"G").is_err() {
                *socket = served.tcp();
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Connections that have shaken hands and are silent from then on.
pub fn half_open(served: &Served, stop: Arc<AtomicBool>) {
    let held: Vec<_> = (0..MANY_SOCKETS).filter_map(|_| served.client(Some(&address())).ok()).collect();
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(TURNED_AWAY);
    }
    drop(held);
}

/// They ask for all there is and what will come, and read nothing of it.
pub fn never_reading(served: &Served, stop: Arc<AtomicBool>) {
    let mut held: Vec<Socket> = (0..MANY_SOCKETS).filter_map(|_| served.client(Some(&address())).ok()).collect();
    while !stop.load(Ordering::Relaxed) {
        for socket in &mut held {
            let asked = socket.send(Message::text("[\"REQ\",\"s\",{\"limit\":5000}]"));
            if asked.is_err()
                && let Ok(another) = served.client(Some(&address()))
            {
                *socket = another;
            }
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

pub fn large_frames(served: &Served, stop: Arc<AtomicBool>) {
    let text = "x".repeat(10 << 20);
    attack(served, &stop, |socket| send(socket, Message::text(text.clone())));
}

pub fn tiny_fragments(served: &Served, stop: Arc<AtomicBool>) {
    let fragments = |(at, byte): (usize, u8)| {
        let kind = if at == 0 { Data::Text } else { Data::Continue };
        Message::Frame(Frame::message(vec![byte], OpCode::Data(kind), at == 999))
    };
    attack(served, &stop, |socket| send_all(socket, std::iter::repeat_n(b' ', 1_000).enumerate().map(fragments)));
}

pub fn pings(served: &Served, stop: Arc<AtomicBool>) {
    let ping = [&[0x89, 0x80 | 100, 0, 0, 0, 0][..], &[7; 100]].concat().repeat(200);
    attack(served, &stop, |socket| {
        let raw = socket.get_mut();
        let _ = raw.read(&mut [0; 64 * 1024]);
        raw.write_all(&ping).is_ok()
    });
}

pub fn replaced_requests(served: &Served, stop: Arc<AtomicBool>) {
    let request = |n: usize| Message::text(format!("[\"REQ\",\"s\",{{\"kinds\":[1],\"limit\":500,\"since\":{n}}}]"));
    attack(served, &stop, |socket| send_all(socket, (0..50).map(request)));
}

pub fn garbage(served: &Served, stop: Arc<AtomicBool>) {
    attack(served, &stop, |socket| send_all(socket, (0..100).map(|n| Message::text(format!("{{garbage {n}")))));
}

pub fn nested(served: &Served, stop: Arc<AtomicBool>) {
    let deep = format!("[\"REQ\",\"s\",{}{}]", "[".repeat(10_000), "]".repeat(10_000));
    attack(served, &stop, |socket| send_all(socket, (0..10).map(|_| Message::text(deep.clone()))));
}
