//! The socket of a connection, with the two halves of the WebSocket protocol on it: [`Reader`] makes messages of what
//! comes in, and what goes out waits in [`Frames`] until the socket takes it. Neither holds memory in silence.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::deflate::Agreed;
use super::frames::Frames;
use super::reader::{Broken, Reader, Received};
use super::socket::Socket;

/// Bytes read from a socket in one go, into memory that all connections of a thread share.
const READ_BYTES: usize = 16 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
}

/// Bytes thrown away at most while a closed connection's client finishes what it was sending.
const LINGER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Bytes thrown away in one go.
const LINGER_READ_BYTES: usize = 4 * 1024;

/// A socket with the frames that wait for it.
#[derive(Debug)]
pub struct Wire {
    socket: Socket,
    reader: Reader,
    /// What is to be written.
    pub frames: Frames,
}

impl Wire {
    /// A socket with nothing to write, for messages of up to `message_bytes_max` bytes. `read` is what came behind the
    /// handshake.
    pub fn new(socket: Socket, read: &Bytes, message_bytes_max: usize, deflate: Option<Agreed>) -> Self {
        let mut reader = Reader::new(message_bytes_max, deflate.is_some());
        reader.push(read);
        Wire { socket, reader, frames: Frames::new(deflate) }
    }

    /// The next message; `None` at the end of the stream, whoever ended it.
    pub fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Received, Broken>>> {
        loop {
            if let Some(received) = self.reader.take().transpose() {
                return Poll::Ready(Some(received));
            }
            match ready!(self.poll_read(cx)) {
                Ok(0) | Err(_) => return Poll::Ready(None),
                Ok(_) => {}
            }
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut read = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut read))?;
            self.reader.push(read.filled());
            Poll::Ready(Ok(read.filled().len()))
        })
    }

    /// Writes what waits. Ready when all is written.
    pub fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.frames.unwritten().is_empty() {
            let len = ready!(Pin::new(&mut self.socket).poll_write(cx, self.frames.unwritten()))?;
            if len == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.frames.advance(len);
        }
        // What is encrypted may wait in a buffer of its own.
        if self.socket.is_encrypted() {
            return Pin::new(&mut self.socket).poll_flush(cx);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what waits, ends the sending side, and reads on until the client has ended its side. A socket that
    /// is closed with unread input is reset, and a reset takes the last frames along before the client has read them.
    pub async fn finish(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_drain(cx)).await?;
        self.socket.shutdown().await?;
        let mut scratch = vec![0; LINGER_READ_BYTES];
        let mut left = LINGER_BYTES_MAX;
        while left > 0 {
            let len = self.socket.read(&mut scratch).await?;
            if len == 0 {
                break;
            }
            left = left.saturating_sub(len);
        }
        Ok(())
    }
}
