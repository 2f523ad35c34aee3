//! Server frames (RFC 6455), encoded straight into the buffer that is written: one copy of each event on its way out,
//! and no memory held for a connection that has nothing to send.

use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

const TEXT: u8 = 0x1;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
/// Every frame is the only one of its message.
const FINAL: u8 = 0x80;

/// Longest header of a server's frame.
const HEADER_BYTES_MAX: usize = 10;

/// Bytes on their way to a socket.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    written: usize,
}

impl Frames {
    /// Makes room for `frames` frames with `bytes` bytes of payload in all.
    pub fn reserve(&mut self, bytes: usize, frames: usize) {
        self.bytes.reserve(bytes + frames * (HEADER_BYTES_MAX + 1));
    }

    /// Adds a text message.
    pub fn text(&mut self, text: &str) {
        self.header(TEXT, text.len());
        self.bytes.extend_from_slice(text.as_bytes());
    }

    /// Adds `["EVENT",id,event]`, given the part before the event as [`crate::protocol::message::event_prefix`] makes
    /// it.
    pub fn event(&mut self, prefix: &str, json: &[u8]) {
        self.header(TEXT, prefix.len() + json.len() + 1);
        self.bytes.extend_from_slice(prefix.as_bytes());
        self.bytes.extend_from_slice(json);
        self.bytes.push(b']');
    }

    /// Adds a ping without payload.
    pub fn ping(&mut self) {
        self.header(PING, 0);
    }

    /// Adds a close frame; nothing may follow it. `reason` has at most 123 bytes.
    pub fn close(&mut self, code: CloseCode, reason: &str) {
        debug_assert!(reason.len() <= 123, "a control frame has at most 125 bytes");
        self.header(CLOSE, 2 + reason.len());
        self.bytes.extend_from_slice(&u16::from(code).to_be_bytes());
        self.bytes.extend_from_slice(reason.as_bytes());
    }

    /// Adds bytes that are whole frames already.
    pub fn raw(&mut self, frames: &[u8]) {
        self.bytes.extend_from_slice(frames);
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
            *self = Frames::default();
        }
    }

    fn header(&mut self, opcode: u8, len: usize) {
        self.bytes.push(FINAL | opcode);
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
}
