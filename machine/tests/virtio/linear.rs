//! A guest program that is written as straight code: each action is a call.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use kvm_ops::guest::{Action, GuestFault, GuestProgram, Outcome};
use kvm_ops::{Gfn, Gpa, Privacy, SharedMask};

/// An action, with its data.
enum Ask {
    Read(Gpa, usize),
    Write(Gpa, Vec<u8>),
    Share(Gpa, u64),
    Out(u16, Vec<u8>),
    Halt,
    Shutdown,
}

/// An outcome, with its data.
enum Told {
    Start(SharedMask),
    Done,
    Data(Vec<u8>),
    Fault(GuestFault),
    Interrupt(u8),
}

/// The code's side. It ends with `None` when the vCPU is gone.
pub(crate) struct Cpu {
    ask: Sender<Ask>,
    told: Receiver<Told>,
    mask: SharedMask,
}

impl Cpu {
    fn act(&self, ask: Ask) -> Option<Told> {
        self.ask.send(ask).ok()?;
        self.told.recv().ok()
    }

    /// The address of memory, or of a device, that is shared with the host.
    pub(crate) fn shared(&self, gpa: Gpa) -> Gpa {
        self.address(gpa, Privacy::Shared)
    }

    /// The address of memory that is shared with the host, or kept from it.
    pub(crate) fn address(&self, gpa: Gpa, privacy: Privacy) -> Gpa {
        let page = self.mask.join(Gfn::containing(gpa), privacy);
        // A normal VM has one kind of memory.
        page.map_or(gpa, |page| Gpa::new(page.get() + gpa.get() % 4096))
    }

    pub(crate) fn read(&self, gpa: Gpa, len: usize) -> Option<Vec<u8>> {
        match self.act(Ask::Read(gpa, len))? {
            Told::Data(data) => Some(data),
            _ => None,
        }
    }

    pub(crate) fn write(&self, gpa: Gpa, data: &[u8]) -> Option<()> {
        match self.act(Ask::Write(gpa, data.to_vec()))? {
            Told::Done => Some(()),
            _ => None,
        }
    }

    /// Shares pages. A normal VM has nothing to share.
    pub(crate) fn share(&self, gpa: Gpa, pages: u64) -> Option<()> {
        match self.act(Ask::Share(gpa, pages))? {
            Told::Done | Told::Fault(GuestFault::NotOffered) => Some(()),
            _ => None,
        }
    }

    pub(crate) fn out(&self, port: u16, data: &[u8]) -> Option<()> {
        self.act(Ask::Out(port, data.to_vec())).map(drop)
    }

    /// Prints a byte at a time.
    pub(crate) fn print(&self, text: &[u8]) -> Option<()> {
        text.iter().try_for_each(|byte| self.out(0x3f8, &[*byte]))
    }

    pub(crate) fn halt(&self) -> Option<u8> {
        match self.act(Ask::Halt)? {
            Told::Interrupt(vector) => Some(vector),
            _ => None,
        }
    }
}

pub(crate) struct Linear {
    ask: Receiver<Ask>,
    told: Sender<Told>,
    data: Vec<u8>,
}

impl Linear {
    /// Starts the code on a thread that waits for the vCPU.
    pub(crate) fn new(code: impl FnOnce(&Cpu) -> Option<()> + Send + 'static) -> Self {
        let (ask, asked) = channel();
        let (tell, told) = channel();
        thread::spawn(move || {
            let Ok(Told::Start(mask)) = told.recv() else {
                return;
            };
            let cpu = Cpu { ask, told, mask };
            if code(&cpu).is_none() {
                // The last words of a guest that gave up.
                let _ = cpu.print(b"?");
            }
            let _ = cpu.act(Ask::Shutdown);
        });
        Self {
            ask: asked,
            told: tell,
            data: Vec::new(),
        }
    }
}

impl GuestProgram for Linear {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        let told = match last {
            Outcome::Start { mask, .. } => Told::Start(mask),
            Outcome::Data(data) => Told::Data(data.to_vec()),
            Outcome::Fault(fault) => Told::Fault(fault),
            Outcome::Interrupt(vector) => Told::Interrupt(vector),
            _ => Told::Done,
        };
        let asked = self
            .told
            .send(told)
            .ok()
            .and_then(|()| self.ask.recv().ok());
        match asked {
            Some(Ask::Read(gpa, len)) => Action::Read { gpa, len },
            Some(Ask::Write(gpa, data)) => {
                self.data = data;
                Action::Write {
                    gpa,
                    data: &self.data,
                }
            }
            Some(Ask::Share(gpa, pages)) => Action::Share { gpa, pages },
            Some(Ask::Out(port, data)) => {
                self.data = data;
                Action::Out {
                    port,
                    data: &self.data,
                }
            }
            Some(Ask::Halt) => Action::Halt,
            Some(Ask::Shutdown) | None => Action::Shutdown,
        }
    }
}
