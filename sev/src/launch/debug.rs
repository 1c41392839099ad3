//! Debugging of a guest whose policy allows it, and reports of the launch.

use alloc::vec::Vec;

use kvm_ops::{Error, Host, Result};
use zerocopy::little_endian::{U32, U64};

use crate::command::{self, Command};
use crate::context::Context;
use crate::memory::Part;
use crate::shared::Shared;

impl<H: Host> Shared<H> {
    fn debug_buffer(&self, context: &Context, len: usize) -> Result<command::Debug> {
        let handle = context.handle().ok_or(Error::WrongState(self.step()))?;
        Ok(command::Debug {
            handle: U32::new(handle),
            len: U32::new(len as u32),
            ..Default::default()
        })
    }

    /// DBG_DECRYPT of a part of the memory at a host address.
    pub(crate) fn debug_decrypt(&self, context: &Context, part: Part) -> Result<Vec<u8>> {
        let len = part.len as usize;
        let mut buffer = self.debug_buffer(context, len)?;
        let mut memory = self.memory();
        self.require_known_at(&mut memory, part.host)?;
        let page = &memory.frame_at(part.host)?.page;
        buffer.src = U64::new(page.hpa().get() + part.offset);
        let sp = self.sp();
        let answer = sp.with_output(len, |at| {
            buffer.dst = U64::new(at);
            sp.run(Command::DbgDecrypt, &mut buffer)
        });
        answer.map(|((), plain)| plain)
    }

    /// DBG_ENCRYPT of a part of the memory at a host address.
    pub(crate) fn debug_encrypt(&self, context: &Context, part: Part, plain: &[u8]) -> Result<()> {
        let mut buffer = self.debug_buffer(context, plain.len())?;
        let mut memory = self.memory();
        self.require_known_at(&mut memory, part.host)?;
        let sp = self.sp();
        sp.with_input(plain, |src| {
            buffer.src = U64::new(src);
            self.in_place_at(&mut memory, part.host, |at| {
                buffer.dst = U64::new(at + part.offset);
                sp.run(Command::DbgEncrypt, &mut buffer)
            })
        })
    }

    /// ATTESTATION without room for the report: firmware refuses, and tells its length where the guest's state allows one.
    pub(crate) fn report_len(&self, context: &Context) -> (u32, Result<()>) {
        let mut buffer = command::Attestation {
            handle: U32::new(context.handle().unwrap_or(0)),
            ..Default::default()
        };
        let done = self.sp().run(Command::Attestation, &mut buffer);
        (buffer.len.get(), done)
    }

    /// ATTESTATION.
    pub(crate) fn attestation(&self, context: &Context, mnonce: [u8; 16]) -> Result<Vec<u8>> {
        const LEN: usize = 0xd0;
        let handle = context.handle().ok_or(Error::WrongState(self.step()))?;
        let sp = self.sp();
        let answer = sp.with_output(LEN, |at| {
            let mut buffer = command::Attestation {
                handle: U32::new(handle),
                address: U64::new(at),
                mnonce,
                len: U32::new(LEN as u32),
                ..Default::default()
            };
            sp.run(Command::Attestation, &mut buffer)
        });
        answer.map(|((), report)| report)
    }
}
