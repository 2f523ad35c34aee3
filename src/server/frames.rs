//! Server frames (RFC 6455), encoded straight into the buffer that is written: one copy of each event on its way out,
//! and no memory held for a connection that has nothing to send.

use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::deflate::{self, Agreed, Batch, COMPRESS_BYTES_MIN};
use crate::relay::outbox::LiveEvent;

const TEXT: u8 = 0x1;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;
/// Every frame is the only one of its message.
const FINAL: u8 = 0x80;
/// The message is compressed (RFC 7692).
const COMPRESSED: u8 = 0x40;

/// Longest header of a server's frame.
const HEADER_BYTES_MAX: usize = 10;

/// Bytes on their way to a socket.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    written: usize,
    /// How messages are compressed, if that was agreed on.
    deflate: Option<Agreed>,
    /// The messages that may refer to each other.
    batch: Option<Batch>,
}

impl Frames {
    /// For a client with which this was agreed on.
    pub fn new(deflate: Option<Agreed>) -> Self {
        Frames { deflate, ..Frames::default() }
    }

    /// Compressed messages refer to none from before this. To be called whenever another connection may have had its turn.
    pub fn begin_batch(&mut self) {
        self.batch = None;
    }

    /// Makes room for `frames` frames with `bytes` bytes of payload in all.
    pub fn reserve(&mut self, bytes: usize, frames: usize) {
        self.bytes.reserve(bytes + frames * (HEADER_BYTES_MAX + 1));
    }

    /// Adds a text message.
    pub fn text(&mut self, text: &str) {
        self.message(&[text.as_bytes()]);
    }

    /// Adds `["EVENT",id,event]`, given the part before the event as [`crate::protocol::message::event_prefix`] makes
    /// it.
    pub fn event(&mut self, prefix: &str, json: &[u8]) {
        self.message(&[prefix.as_bytes(), json, b"]"]);
    }

    /// As [`Frames::event`], for an event that goes to many: where messages are compressed, this one is for all of them at
    /// once.
    pub fn live(&mut self, prefix: &str, event: &LiveEvent) {
        let stored = deflate::stored_block(prefix.as_bytes());
        match (self.deflate, stored) {
            (Some(_), Some(stored)) if event.json.len() >= COMPRESS_BYTES_MIN => {
                let pack = |json: &[u8]| deflate::deflate(&[json, b"]"], None, |packed| Box::from(packed));
                let packed = event.packed(pack);
                let len = stored.len() + prefix.len() + packed.len();
                self.reserve(len, 1);
                self.header(COMPRESSED | TEXT, len);
                for part in [&stored, prefix.as_bytes(), packed] {
                    self.bytes.extend_from_slice(part);
                }
                // The client's window has moved on without the thread's compressor.
                self.batch = None;
            }
            _ => self.event(prefix, &event.json),
        }
    }

    /// Adds a text message that comes in parts.
    fn message(&mut self, parts: &[&[u8]]) {
        let len = parts.iter().map(|part| part.len()).sum();
        let Some(Agreed { takeover }) = self.deflate.filter(|_| len >= COMPRESS_BYTES_MIN) else {
            self.reserve(len, 1);
            self.header(TEXT, len);
            return parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        };
        if takeover && self.batch.is_none() {
            self.batch = Some(Batch::begin());
        }
        deflate::deflate(parts, self.batch, |packed| {
            self.header(COMPRESSED | TEXT, packed.len());
            self.bytes.extend_from_slice(packed);
        });
    }

    /// Adds a ping without payload.
    pub fn ping(&mut self) {
        self.header(PING, 0);
    }

    /// Adds the answer to a ping.
    pub fn pong(&mut self, payload: &[u8]) {
        self.header(PONG, payload.len());
        self.bytes.extend_from_slice(payload);
    }

    /// Adds the answer to a close frame; nothing may follow it.
    pub fn close_in_return(&mut self, code: Option<CloseCode>) {
        match code {
            Some(code) => self.close(code, ""),
            None => self.header(CLOSE, 0),
        }
    }

    /// Adds a close frame; nothing may follow it. `reason` has at most 123 bytes.
    pub fn close(&mut self, code: CloseCode, reason: &str) {
        debug_assert!(reason.len() <= 123, "a control frame has at most 125 bytes");
        self.header(CLOSE, 2 + reason.len());
        self.bytes.extend_from_slice(&u16::from(code).to_be_bytes());
        self.bytes.extend_from_slice(reason.as_bytes());
    }

    /// What is still to be written.
    pub fn unwritten(&self) -> &[u8] {
        &self.bytes[self.written..]
    }

    /// Notes that the first `len` bytes of [`Frames::unwritten`] were written.
    pub fn advance(&mut self, len: usize) {
        self.written += len;
        if self.written >= self.bytes.len() {
            // The memory goes too: most connections are silent most of the time.
            *self = Frames { deflate: self.deflate, batch: self.batch, ..Frames::default() };
        }
    }

    fn header(&mut self, first: u8, len: usize) {
        self.bytes.push(FINAL | first);
        match len {
            0..=125 => self.bytes.push(len as u8),
            126..=0xffff => {
                self.bytes.push(126);
                self.bytes.extend_from_slice(&(len as u16).to_be_bytes());
            }
            _ => {
                self.bytes.push(127);
                self.bytes.extend_from_slice(&(len as u64).to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Cursor;

    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::{Role, WebSocket};

    use super::*;

    /// What a client reads from the frames: text messages as they are, others by their name.
    pub(crate) fn read(frames: &Frames) -> Vec<String> {
        let mut socket =
            WebSocket::from_partially_read(Cursor::new(Vec::new()), frames.unwritten().to_vec(), Role::Client, None);
        let mut seen = Vec::new();
        while let Ok(message) = socket.read() {
            seen.push(match message {
                Message::Text(text) => text.to_string(),
                Message::Ping(_) => "ping".to_owned(),
                Message::Close(Some(frame)) => format!("close {} {}", u16::from(frame.code), frame.reason),
                other => panic!("unexpected {other:?}"),
            });
        }
        seen
    }

    /// A client's WebSocket library reads back what was framed, at each edge of the three length forms.
    #[test]
    fn a_client_reads_what_was_framed() {
        let texts: Vec<String> = [0, 1, 125, 126, 127, 65_535, 65_536].map(|len| "x".repeat(len)).into();
        let mut frames = Frames::default();
        texts.iter().for_each(|text| frames.text(text));
        frames.ping();
        frames.event("[\"EVENT\",\"s\",", b"{}");
        frames.close(CloseCode::Away, "bye");
        let mut expected = texts;
        expected.extend(["ping".to_owned(), "[\"EVENT\",\"s\",{}]".to_owned(), "close 1001 bye".to_owned()]);
        assert_eq!(read(&frames), expected);
    }

    /// Partial writes go on where they stopped; in the end no memory is held.
    #[test]
    fn partial_writes_go_on_where_they_stopped() {
        let mut frames = Frames::default();
        frames.text("hello");
        frames.advance(3);
        assert_eq!(frames.unwritten(), b"ello");
        frames.advance(4);
        assert_eq!((frames.unwritten().len(), frames.bytes.capacity()), (0, 0));
    }

    /// The texts of compressed frames, as a client that keeps its window reads them, and the bytes of all frames.
    fn read_compressed(frames: &Frames) -> (Vec<String>, usize) {
        let mut window = flate2::Decompress::new(false);
        let (mut bytes, mut texts) = (frames.unwritten(), Vec::new());
        while let [first, len, rest @ ..] = bytes {
            let (len, rest) = match len {
                126 => (usize::from(u16::from_be_bytes([rest[0], rest[1]])), &rest[2..]),
                len => (usize::from(*len), rest),
            };
            let (payload, rest) = rest.split_at(len);
            let mut text = Vec::with_capacity(100_000);
            if first & COMPRESSED == 0 {
                text.extend_from_slice(payload);
            } else {
                let whole = [payload, &[0, 0, 0xff, 0xff]].concat();
                window.decompress_vec(&whole, &mut text, flate2::FlushDecompress::Sync).unwrap();
            }
            texts.push(String::from_utf8(text).unwrap());
            bytes = rest;
        }
        (texts, frames.unwritten().len())
    }

    /// Short messages go as they are, long ones compressed; live ones are compressed once for all and mix with the others,
    /// with and without a shared context.
    #[test]
    fn compressed_messages_are_read_by_a_client() {
        let json = format!("{{\"content\":\"{}\"}}", "hello, sledge ".repeat(30));
        let event = LiveEvent::new(json.clone().into_bytes().into());
        let prefix = "[\"EVENT\",\"s\",";
        let lens = [Some(true), Some(false), None].map(|takeover| {
            let mut frames = Frames::new(takeover.map(|takeover| Agreed { takeover }));
            frames.text("[\"EOSE\",\"s\"]");
            frames.event(prefix, json.as_bytes());
            frames.event(prefix, json.as_bytes());
            frames.live(prefix, &event);
            frames.begin_batch();
            frames.live("[\"EVENT\",\"other\",", &event);
            frames.event(prefix, json.as_bytes());
            let whole = format!("{prefix}{json}]");
            let other = format!("[\"EVENT\",\"other\",{json}]");
            let (texts, len) = read_compressed(&frames);
            assert_eq!(texts, ["[\"EOSE\",\"s\"]", &whole, &whole, &whole, &other, &whole]);
            len
        });
        assert!(lens[0] < lens[1] && lens[1] * 3 < lens[2], "{lens:?}");
    }
}
