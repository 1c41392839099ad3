//! What a guest that exchanges keys does with its memory and its host.

use kvm_ops_core::{Gfn, Gpa, PAGE_SIZE, Privacy};

use crate::failure::Failure;
use crate::message::MAX_MESSAGE;
use crate::request::call;
use crate::steps::{Done, Guest, Step};

/// The buffer that is shared with the host.
pub(crate) const BUFFER: Gpa = Gpa::new(0x1_0000);
const BUFFER_PAGES: u64 = 16;
/// Bytes of memory that the guest needs.
#[cfg(feature = "host")]
pub(crate) const MEMORY: u64 = BUFFER.get() + BUFFER_BYTES;

pub(crate) const BUFFER_BYTES: u64 = BUFFER_PAGES * PAGE_SIZE;
const _: () = assert!(MAX_MESSAGE as u64 <= BUFFER_BYTES);

/// The parts of the platform.
#[derive(Clone)]
pub(crate) struct Io(pub(crate) Guest);

impl Io {
    /// Shares the buffer with the host.
    pub(crate) async fn share(&self) -> Result<(), Failure> {
        let step = Step::Share {
            gpa: BUFFER,
            pages: BUFFER_PAGES,
        };
        done(self.0.step(step).await)
    }

    pub(crate) fn at(&self, gpa: Gpa, privacy: Privacy) -> Result<Gpa, Failure> {
        let base = self.0.mask().join(Gfn::containing(gpa), privacy);
        let base = base.ok_or(Failure::Host)?;
        Ok(Gpa::new(base.get() | (gpa.get() % PAGE_SIZE)))
    }

    /// Writes memory, a page at a time.
    pub(crate) async fn write(
        &self,
        to: Gpa,
        privacy: Privacy,
        data: &[u8],
    ) -> Result<(), Failure> {
        let mut at = to.get();
        let mut rest = data;
        while !rest.is_empty() {
            let room = (PAGE_SIZE - at % PAGE_SIZE) as usize;
            let (now, later) = rest.split_at(room.min(rest.len()));
            let step = Step::Write {
                gpa: self.at(Gpa::new(at), privacy)?,
                data: now.to_vec(),
            };
            done(self.0.step(step).await)?;
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    /// Reads memory, a page at a time.
    pub(crate) async fn read(
        &self,
        from: Gpa,
        privacy: Privacy,
        len: usize,
    ) -> Result<Vec<u8>, Failure> {
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let at = from.get() + out.len() as u64;
            let room = (PAGE_SIZE - at % PAGE_SIZE) as usize;
            let step = Step::Read {
                gpa: self.at(Gpa::new(at), privacy)?,
                len: room.min(len - out.len()),
            };
            match self.0.step(step).await {
                Done::Data(data) if !data.is_empty() => out.extend_from_slice(&data),
                _ => return Err(Failure::Host),
            }
        }
        Ok(out)
    }

    pub(crate) async fn hypercall(&self, nr: u64, args: [u64; 2]) -> Result<u64, Failure> {
        let args = [args[0], args[1], 0, 0];
        match self.0.step(Step::Hypercall { nr, args }).await {
            Done::Value(value) => Ok(value),
            _ => Err(Failure::Host),
        }
    }

    /// Waits for a request of the host; `None` if it has none now.
    pub(crate) async fn wait(&self, room: usize) -> Result<Option<Vec<u8>>, Failure> {
        let args = [BUFFER.get(), room as u64];
        match self.hypercall(call::WAIT, args).await? {
            0 => Ok(None),
            len if len <= room as u64 => {
                let request = self.read(BUFFER, Privacy::Shared, len as usize).await;
                request.map(Some)
            }
            _ => Err(Failure::Request),
        }
    }

    /// Tells the host how a request ended.
    pub(crate) async fn tell(&self, code: u64, detail: u64) -> Result<(), Failure> {
        self.hypercall(call::STATUS, [code, detail])
            .await
            .map(|_| ())
    }

    /// Shows bytes to the host.
    pub(crate) async fn show(&self, bytes: &[u8]) -> Result<(), Failure> {
        self.write(BUFFER, Privacy::Shared, bytes).await
    }

    /// Sends a message to the peer.
    pub(crate) async fn send(&self, message: &[u8]) -> Result<(), Failure> {
        if message.len() > MAX_MESSAGE {
            return Err(Failure::Message);
        }
        self.show(message).await?;
        let args = [BUFFER.get(), message.len() as u64];
        match self.hypercall(call::SEND, args).await? {
            0 => Ok(()),
            _ => Err(Failure::Closed),
        }
    }

    /// Receives a message from the peer.
    pub(crate) async fn receive(&self) -> Result<Vec<u8>, Failure> {
        let args = [BUFFER.get(), MAX_MESSAGE as u64];
        match self.hypercall(call::RECEIVE, args).await? {
            0 => Err(Failure::Closed),
            len if len <= MAX_MESSAGE as u64 => {
                self.read(BUFFER, Privacy::Shared, len as usize).await
            }
            _ => Err(Failure::Message),
        }
    }
}

fn done(outcome: Done) -> Result<(), Failure> {
    match outcome {
        Done::Plain => Ok(()),
        Done::Fault(fault) => Err(fault.into()),
        _ => Err(Failure::Host),
    }
}
