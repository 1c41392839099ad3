//! Debugging of a guest whose policy allows it, and reports of the launch.

use alloc::vec::Vec;

use kvm_ops::{Error, Field, Gfn, Host, Result};
use zerocopy::little_endian::{U32, U64};

use crate::command::{self, Command};
use crate::context::Context;
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

    /// DBG_DECRYPT of a range inside one page.
    pub(crate) fn debug_decrypt(
        &self,
        context: &Context,
        gfn: Gfn,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        let mut buffer = self.debug_buffer(context, len)?;
        buffer.src = U64::new(self.guest_address(gfn, offset)?);
        let sp = self.sp();
        let answer = sp.with_output(len, |at| {
            buffer.dst = U64::new(at);
            sp.run(Command::DbgDecrypt, &mut buffer)
        });
        answer.map(|((), plain)| plain)
    }

    /// DBG_ENCRYPT of a range inside one page.
    pub(crate) fn debug_encrypt(
        &self,
        context: &Context,
        gfn: Gfn,
        offset: u64,
        plain: &[u8],
    ) -> Result<()> {
        let mut buffer = self.debug_buffer(context, plain.len())?;
        let mut memory = self.memory();
        // The command takes a page of 4 KiB.
        self.split(&mut memory, gfn)?;
        let frame = memory
            .frame_mut(gfn)
            .ok_or(Error::NotFound(Field::Gfn, gfn.get()))?;
        let sp = self.sp();
        sp.with_input(plain, |src| {
            buffer.src = U64::new(src);
            let (held, done) = sp.in_place(&frame.page, |at| {
                buffer.dst = U64::new(at + offset);
                sp.run(Command::DbgEncrypt, &mut buffer)
            });
            frame.held = held;
            done
        })
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
