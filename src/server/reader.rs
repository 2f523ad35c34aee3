//! A client's frames (RFC 6455) to messages, without a socket: bytes go in as they come, messages come out.
//!
//! Own code, and not a library's, for three reasons that each count for a relay with thousands of connections: a
//! connection that is silent holds no buffer at all (tungstenite keeps one for each); compressed messages (RFC 7692) are
//! read, for which tungstenite has no room; and what one message may cost is bounded in bytes, after inflating, and in
//! fragments. tungstenite is what the tests write frames with.

use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::deflate::{self, Inflated};

/// Opcodes of RFC 6455.
const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;

const FINAL: u8 = 0x80;
/// Set on the first frame of a compressed message (RFC 7692).
const COMPRESSED: u8 = 0x40;
const RESERVED: u8 = 0x30;
const MASKED: u8 = 0x80;

/// Longest payload of a control frame.
const CONTROL_BYTES_MAX: usize = 125;

/// Fragments without a byte in them that one message may have: no library sends one, and nothing else bounds them.
const EMPTY_FRAGMENTS_MAX: usize = 64;

/// Something that a client has said.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A text message.
    Text(String),
    /// A binary message, which means nothing here.
    Binary,
    /// To be answered with the same payload.
    Ping(Vec<u8>),
    /// An answer to a ping.
    Pong,
    /// The client closes. The code, if it gave one that it may give.
    Close(Option<CloseCode>),
}

/// What cannot be gone on after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// More bytes than a message may have.
    #[error("larger than a message may be")]
    TooLarge,
    /// A text message that is no UTF-8.
    #[error("not UTF-8")]
    NotText,
    /// Not what RFC 6455 or RFC 7692 allow.
    #[error("not the WebSocket protocol: {0}")]
    Protocol(&'static str),
}

/// Reads the frames of one client.
#[derive(Debug)]
pub struct Reader {
    /// Bytes that have not become messages yet; nothing, not even memory, while the client is silent.
    buffer: Vec<u8>,
    /// Where the next frame begins in it.
    at: usize,
    /// A message whose last fragment has not come.
    partial: Option<Box<Partial>>,
    message_bytes_max: usize,
    /// Whether compressed messages were agreed on.
    deflate: bool,
}

#[derive(Debug)]
struct Partial {
    is_text: bool,
    is_compressed: bool,
    empty_fragments: usize,
    bytes: Vec<u8>,
}

/// A frame's header.
#[derive(Clone, Copy, Debug)]
struct Header {
    first: u8,
    mask: [u8; 4],
    /// Bytes of the header.
    len: usize,
    payload_len: usize,
}

impl Reader {
    /// For messages of up to `message_bytes_max` bytes, compressed or not.
    pub fn new(message_bytes_max: usize, deflate: bool) -> Self {
        Reader { buffer: Vec::new(), at: 0, partial: None, message_bytes_max, deflate }
    }

    /// Takes bytes as they come from the socket. To be called once [`Reader::take`] has nothing more.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.buffer.drain(..self.at);
            self.at = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, or `None` until more bytes come.
    ///
    /// # Errors
    /// [`Broken`]: the connection must be closed.
    pub fn take(&mut self) -> Result<Option<Received>, Broken> {
        while let Some(header) = self.header()? {
            let start = self.at + header.len;
            let end = start + header.payload_len;
            if self.buffer.len() < end {
                // The length was checked: this is never more than a message may have.
                self.buffer.reserve(end - self.buffer.len());
                break;
            }
            unmask(&mut self.buffer[start..end], header.mask);
            let payload = std::mem::take(&mut self.buffer);
            let received = self.frame(header, &payload[start..end]);
            self.buffer = payload;
            self.at = end;
            if self.at == self.buffer.len() {
                (self.buffer, self.at) = (Vec::new(), 0);
            }
            if let Some(received) = received? {
                return Ok(Some(received));
            }
        }
        Ok(None)
    }

    fn header(&self) -> Result<Option<Header>, Broken> {
        let bytes = &self.buffer[self.at..];
        let &[first, second, ..] = bytes else { return Ok(None) };
        if second & MASKED == 0 {
            return Err(Broken::Protocol("a client's frame is masked"));
        }
        let extended = match second & !MASKED {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let len = 2 + extended + 4;
        if bytes.len() < len {
            return Ok(None);
        }
        let long = bytes[2..2 + extended].iter().fold(0u64, |len, byte| len << 8 | u64::from(*byte));
        let payload_len = if extended == 0 { u64::from(second & !MASKED) } else { long };
        let payload_len = usize::try_from(payload_len).map_err(|_| Broken::TooLarge)?;
        let mask = [bytes[len - 4], bytes[len - 3], bytes[len - 2], bytes[len - 1]];
        let header = Header { first, mask, len, payload_len };
        self.check(header)?;
        Ok(Some(header))
    }

    /// Refuses a frame by its header, before anything is kept of it.
    fn check(&self, header: Header) -> Result<(), Broken> {
        let opcode = header.first & 0x0f;
        let starts_message = matches!(opcode, TEXT | BINARY);
        if header.first & RESERVED != 0 {
            return Err(Broken::Protocol("reserved bits"));
        }
        if header.first & COMPRESSED != 0 && !(self.deflate && starts_message) {
            return Err(Broken::Protocol("compression that was not agreed on"));
        }
        match opcode {
            CLOSE | PING | PONG if header.first & FINAL == 0 => Err(Broken::Protocol("a control frame in fragments")),
            CLOSE | PING | PONG if header.payload_len > CONTROL_BYTES_MAX => {
                Err(Broken::Protocol("a long control frame"))
            }
            CLOSE | PING | PONG => Ok(()),
            TEXT | BINARY if self.partial.is_some() => Err(Broken::Protocol("a message inside another")),
            CONTINUATION if self.partial.is_none() => Err(Broken::Protocol("a fragment of no message")),
            TEXT | BINARY | CONTINUATION => {
                let so_far = self.partial.as_ref().map_or(0, |partial| partial.bytes.len());
                let fits = header.payload_len <= self.message_bytes_max.saturating_sub(so_far);
                if fits { Ok(()) } else { Err(Broken::TooLarge) }
            }
            _ => Err(Broken::Protocol("an unknown opcode")),
        }
    }

    fn frame(&mut self, header: Header, payload: &[u8]) -> Result<Option<Received>, Broken> {
        let is_final = header.first & FINAL != 0;
        let is_compressed = header.first & COMPRESSED != 0;
        match header.first & 0x0f {
            PING => Ok(Some(Received::Ping(payload.to_vec()))),
            PONG => Ok(Some(Received::Pong)),
            CLOSE => close(payload).map(|code| Some(Received::Close(code))),
            CONTINUATION => self.go_on(is_final, payload),
            opcode if is_final => self.whole(opcode == TEXT, is_compressed, payload).map(Some),
            opcode => {
                let (is_text, bytes) = (opcode == TEXT, payload.to_vec());
                self.partial = Some(Box::new(Partial { is_text, is_compressed, empty_fragments: 0, bytes }));
                Ok(None)
            }
        }
    }

    fn go_on(&mut self, is_final: bool, payload: &[u8]) -> Result<Option<Received>, Broken> {
        let Some(partial) = &mut self.partial else { return Ok(None) };
        partial.empty_fragments += usize::from(payload.is_empty());
        if partial.empty_fragments > EMPTY_FRAGMENTS_MAX {
            return Err(Broken::Protocol("fragments without content"));
        }
        partial.bytes.extend_from_slice(payload);
        if !is_final {
            return Ok(None);
        }
        let Some(partial) = self.partial.take() else { return Ok(None) };
        self.whole(partial.is_text, partial.is_compressed, &partial.bytes).map(Some)
    }

    fn whole(&self, is_text: bool, is_compressed: bool, bytes: &[u8]) -> Result<Received, Broken> {
        let bytes = match is_compressed {
            false => bytes.to_vec(),
            true => match deflate::inflate(bytes, self.message_bytes_max) {
                Inflated::Whole(bytes) => bytes,
                Inflated::TooLarge => return Err(Broken::TooLarge),
                Inflated::Broken => return Err(Broken::Protocol("what was compressed cannot be read")),
            },
        };
        if !is_text {
            return Ok(Received::Binary);
        }
        String::from_utf8(bytes).map(Received::Text).map_err(|_| Broken::NotText)
    }
}

/// The code of a close frame. One that may not be sent, or a reason that is no text, is a fault of its own.
fn close(payload: &[u8]) -> Result<Option<CloseCode>, Broken> {
    let (code, reason) = match payload {
        [] => return Ok(None),
        [high, low, reason @ ..] => (CloseCode::from(u16::from_be_bytes([*high, *low])), reason),
        [_] => return Err(Broken::Protocol("half a close code")),
    };
    if std::str::from_utf8(reason).is_err() {
        return Err(Broken::NotText);
    }
    if code.is_allowed() { Ok(Some(code)) } else { Err(Broken::Protocol("a close code that may not be sent")) }
}

/// Undoes the mask, eight bytes at a time.
fn unmask(bytes: &mut [u8], [a, b, c, d]: [u8; 4]) {
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let mut chunks = bytes.chunks_exact_mut(8);
    for chunk in &mut chunks {
        let value = u64::from_ne_bytes(chunk[..8].try_into().expect("a chunk has eight bytes")) ^ wide;
        chunk.copy_from_slice(&value.to_ne_bytes());
    }
    let mask = [a, b, c, d];
    chunks.into_remainder().iter_mut().enumerate().for_each(|(at, byte)| *byte ^= mask[at % 4]);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Cursor;

    use proptest::prelude::*;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
    use tokio_tungstenite::tungstenite::protocol::frame::{CloseFrame, Frame};
    use tokio_tungstenite::tungstenite::protocol::{Role, WebSocket};

    use super::*;

    const MAX: usize = 1_000;

    /// The bytes that a client's library writes for these messages.
    fn written(messages: Vec<Message>) -> Vec<u8> {
        let mut socket = WebSocket::from_raw_socket(Cursor::new(Vec::new()), Role::Client, None);
        messages.into_iter().for_each(|message| socket.send(message).unwrap());
        socket.get_ref().get_ref().clone()
    }

    /// What is read when the bytes come in portions of this many.
    fn read(bytes: &[u8], portion: usize) -> Result<Vec<Received>, Broken> {
        let mut reader = Reader::new(MAX, true);
        let mut received = Vec::new();
        for portion in bytes.chunks(portion) {
            reader.push(portion);
            while let Some(message) = reader.take()? {
                received.push(message);
            }
        }
        if reader.partial.is_none() && reader.at == reader.buffer.len() {
            assert_eq!(reader.buffer.capacity(), 0, "silence holds no memory");
        }
        Ok(received)
    }

    fn fragment(text: &str, opcode: Data, is_final: bool) -> Message {
        Message::Frame(Frame::message(text.as_bytes().to_vec(), OpCode::Data(opcode), is_final))
    }

    /// One frame by hand, masked with zeros.
    fn raw(first: u8, payload: &[u8]) -> Vec<u8> {
        assert!(payload.len() < 126);
        [&[first, MASKED | payload.len() as u8, 0, 0, 0, 0], payload].concat()
    }

    /// Every kind of frame, whole and in fragments with a ping in between, however the bytes arrive.
    #[test]
    fn messages_are_read_however_they_arrive() {
        let bytes = written(vec![
            Message::text("hello"),
            Message::text(""),
            Message::text("ä".repeat(200)),
            fragment("on", Data::Text, false),
            Message::Ping(vec![1, 2].into()),
            fragment("", Data::Continue, false),
            fragment("ce", Data::Continue, true),
            Message::binary(vec![0xff; 5]),
            Message::Pong(vec![].into()),
            Message::Close(Some(CloseFrame { code: CloseCode::Away, reason: "bye".into() })),
        ]);
        let expected = [
            Received::Text("hello".to_owned()),
            Received::Text(String::new()),
            Received::Text("ä".repeat(200)),
            Received::Ping(vec![1, 2]),
            Received::Text("once".to_owned()),
            Received::Binary,
            Received::Pong,
            Received::Close(Some(CloseCode::Away)),
        ];
        for portion in [1, 2, 7, 100, 10_000] {
            assert_eq!(read(&bytes, portion).unwrap(), expected, "in portions of {portion}");
        }
    }

    /// The largest message passes, whole and in fragments; one byte more is refused by the header alone.
    #[test]
    fn the_limit_holds_for_messages_and_sums_of_fragments() {
        let half = "x".repeat(MAX / 2);
        let whole = written(vec![Message::text(half.repeat(2))]);
        assert_eq!(read(&whole, 64).unwrap(), [Received::Text(half.repeat(2))]);
        let parts = |rest: &str| {
            written(vec![
                fragment(&half, Data::Text, false),
                fragment(&half, Data::Continue, false),
                fragment(rest, Data::Continue, true),
            ])
        };
        assert_eq!(read(&parts(""), 64).unwrap().len(), 1);
        assert_eq!(read(&parts("x"), 64), Err(Broken::TooLarge));
        let mut reader = Reader::new(MAX, false);
        reader.push(&[FINAL | TEXT, MASKED | 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(reader.take(), Err(Broken::TooLarge));
        assert!(reader.buffer.capacity() < 100, "nothing was reserved for it");
    }

    /// What RFC 6455 forbids.
    #[test]
    fn what_is_forbidden_is_refused() {
        let protocol = |bytes: &[u8]| assert!(matches!(read(bytes, 3), Err(Broken::Protocol(_))), "{bytes:?}");
        protocol(&[FINAL | TEXT, 1, b'x']);
        protocol(&raw(FINAL | 0x20 | TEXT, b"x"));
        protocol(&raw(FINAL | COMPRESSED | PING, b"x"));
        protocol(&raw(FINAL | 0x3, b"x"));
        protocol(&raw(FINAL | 0xb, b"x"));
        protocol(&raw(PING, b"x"));
        protocol(&raw(FINAL | CONTINUATION, b"x"));
        protocol(&[raw(TEXT, b"x"), raw(FINAL | TEXT, b"x")].concat());
        protocol(&[FINAL | PING, MASKED | 126, 0, 126, 0, 0, 0, 0]);
        protocol(&raw(FINAL | CLOSE, &[3]));
        protocol(&raw(FINAL | CLOSE, &1_005u16.to_be_bytes()));
        let empty = [raw(TEXT, b"x"), raw(CONTINUATION, b"").repeat(EMPTY_FRAGMENTS_MAX + 1)].concat();
        protocol(&empty);
        assert_eq!(read(&raw(FINAL | TEXT, b"\xff"), 9), Err(Broken::NotText));
        assert_eq!(read(&raw(FINAL | CLOSE, b"\x03\xe8\xff"), 9), Err(Broken::NotText));
        assert_eq!(read(&raw(FINAL | CLOSE, b""), 9), Ok(vec![Received::Close(None)]));
        let mut plain = Reader::new(MAX, false);
        plain.push(&raw(FINAL | COMPRESSED | TEXT, b"x"));
        assert!(matches!(plain.take(), Err(Broken::Protocol(_))), "compression was not agreed on");
    }

    /// Compressed messages come out as they went in, in fragments too; a small one that unpacks to more than a message
    /// may have is refused without unpacking it all.
    #[test]
    fn compressed_messages_are_inflated_within_the_limit() {
        let text = "[\"EVENT\",".repeat(50);
        let packed = deflate::tests::deflated(text.as_bytes());
        assert!(packed.len() < 100);
        let (head, tail) = packed.split_at(9);
        let bytes = [
            raw(FINAL | COMPRESSED | TEXT, &packed),
            raw(COMPRESSED | TEXT, head),
            raw(FINAL | CONTINUATION, tail),
            raw(FINAL | TEXT, b"plain"),
        ];
        let expected = [&text, &text, "plain"].map(|text| Received::Text(text.to_owned()));
        assert_eq!(read(&bytes.concat(), 5).unwrap(), expected);
        let bomb = deflate::tests::deflated(&[b'x'; 10 * MAX]);
        assert!(bomb.len() < 125);
        assert_eq!(read(&raw(FINAL | COMPRESSED | TEXT, &bomb), 9), Err(Broken::TooLarge));
        assert!(matches!(read(&raw(FINAL | COMPRESSED | TEXT, &[0xff; 20]), 9), Err(Broken::Protocol(_))));
    }

    proptest! {
        /// Any bytes at all: no panic, and no more memory than one message and one portion.
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2_000), portion in 1usize..300) {
            let mut reader = Reader::new(MAX, true);
            for portion in bytes.chunks(portion) {
                reader.push(portion);
                while let Ok(Some(_)) = reader.take() {}
                prop_assert!(reader.buffer.capacity() <= 4 * MAX + 2 * 2_000);
            }
        }

        /// A library's frames of any length and mask are read back, and unmasking agrees with the definition.
        #[test]
        fn masks_and_lengths(texts in prop::collection::vec("[a-zä]{0,300}", 0..5), portion in 1usize..400) {
            let bytes = written(texts.iter().map(Message::text).collect());
            let expected: Vec<Received> = texts.into_iter().map(Received::Text).collect();
            prop_assert_eq!(read(&bytes, portion).unwrap(), expected);
        }
    }
}
