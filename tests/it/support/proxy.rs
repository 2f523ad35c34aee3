//! A wire between a client and a relay that counts the bytes each way, and tells when so many have passed. Its address stays
//! when the relay behind it is another one.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// What has passed since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Bytes from the client to the relay.
    pub up: u64,
    /// Bytes from the relay to the client.
    pub down: u64,
}

/// A listening proxy. Its threads end with the process.
pub struct Proxy {
    addr: SocketAddr,
    counted: Arc<Counted>,
}

type Alarm = (u64, Box<dyn FnOnce() + Send>);

#[derive(Default)]
struct Counted {
    up: AtomicU64,
    down: AtomicU64,
    relay: Mutex<Option<SocketAddr>>,
    alarm: Mutex<Option<Alarm>>,
}

impl Counted {
    fn add(&self, counter: &AtomicU64, bytes: u64) {
        counter.fetch_add(bytes, Ordering::Relaxed);
        let mut alarm = self.alarm.lock().expect("nobody panics with it");
        match &mut *alarm {
            Some((left, _)) if *left > bytes => *left -= bytes,
            Some(_) => {
                let (_, ring) = alarm.take().expect("it is there");
                ring();
            }
            None => {}
        }
    }
}

impl Proxy {
    /// Listens on a free port. It leads nowhere yet.
    pub fn new() -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let counted = Arc::new(Counted::default());
        let shared = Arc::clone(&counted);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let relay = *shared.relay.lock().expect("nobody panics with it");
                // A relay that is not there ends the connection, as it would without a proxy.
                if let Some(Ok(relay)) = relay.map(TcpStream::connect) {
                    join(client, relay, &shared);
                }
            }
        });
        Proxy { addr, counted }
    }

    /// Leads new connections to the relay at `relay`.
    pub fn lead_to(&self, relay: SocketAddr) {
        *self.counted.relay.lock().expect("nobody panics with it") = Some(relay);
    }

    pub fn url(&self) -> String {
        format!("ws://{}", self.addr)
    }

    /// Calls `ring` once, when so many more bytes have passed in either direction.
    pub fn after(&self, bytes: u64, ring: impl FnOnce() + Send + 'static) {
        *self.counted.alarm.lock().expect("nobody panics with it") = Some((bytes, Box::new(ring)));
    }

    /// What has passed since this was last asked.
    pub fn take_passed(&self) -> Passed {
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        Passed { up: take(&self.counted.up), down: take(&self.counted.down) }
    }
}

fn join(client: TcpStream, relay: TcpStream, counted: &Arc<Counted>) {
    for socket in [&client, &relay] {
        socket.set_nodelay(true).expect("a socket");
    }
    let twins = (client.try_clone().expect("a socket"), relay.try_clone().expect("a socket"));
    for (from, to, is_up) in [(client, relay, true), (twins.1, twins.0, false)] {
        let counted = Arc::clone(counted);
        thread::spawn(move || pump(from, to, &counted, is_up));
    }
}

/// Passes bytes on until one side has gone, and tells the other.
fn pump(mut from: TcpStream, mut to: TcpStream, counted: &Counted, is_up: bool) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        counted.add(if is_up { &counted.up } else { &counted.down }, bytes as u64);
        if to.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
