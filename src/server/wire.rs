//! The socket below the WebSocket: reads go through, writes wait in [`Frames`] until the connection has them written.
//!
//! tungstenite reads, unmasks and checks the client's frames and answers pings and closes by itself. What it writes is
//! added to the same buffer as the relay's own frames, whole frames in order.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use super::frames::Frames;

/// Bytes thrown away at most while a closed connection's client finishes what it was sending.
const LINGER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Bytes thrown away in one go.
const LINGER_READ_BYTES: usize = 4 * 1024;

/// A socket with the frames that wait for it.
#[derive(Debug)]
pub struct Wire {
    socket: TcpStream,
    /// What is to be written.
    pub frames: Frames,
}

impl Wire {
    /// A socket with nothing to write.
    pub fn new(socket: TcpStream) -> Self {
        Wire { socket, frames: Frames::default() }
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

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, _cx: &mut Context<'_>, frames: &[u8]) -> Poll<io::Result<usize>> {
        self.frames.raw(frames);
        Poll::Ready(Ok(frames.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
