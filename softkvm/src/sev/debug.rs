//! DBG_DECRYPT and DBG_ENCRYPT: any length, at any address. Firmware works on blocks of 16 bytes; what
//! does not begin and end with one goes through a wider read.

use kvm_ops_uapi::checks::Check;
use kvm_ops_uapi::checks::dbg::{COPY, GIVEN, PINNED, SEV, SEV_FD, WRAP};
use kvm_ops_uapi::sev::{self as uapi, SevDbg};
use kvm_ops_uapi::{U32, U64};

use super::blobs::Blobs;
use super::command::{Answer, Call, Sent};
use super::engine::{Engine, Failed};
use super::pin::{self, Use};
use crate::refusal::{Result, ensure};
use crate::vm::State;

const PAGE: u64 = 4096;
const BLOCK: u64 = 16;

/// A piece that lies in one page on either side.
struct Piece {
    src: u64,
    dst: u64,
    len: u64,
}

impl Piece {
    fn first(src: u64, dst: u64, left: u64) -> Self {
        let to_end = |address: u64| PAGE - address % PAGE;
        let len = left.min(to_end(src)).min(to_end(dst));
        Self { src, dst, len }
    }
}

/// The blocks around a range of guest memory that lies in one page, decrypted, and where in them the
/// range starts.
fn decrypt_blocks(engine: &mut Engine, guest: u64, len: u64) -> Result<(Vec<u8>, usize), Failed> {
    let start = guest - guest % BLOCK;
    let wide = (guest + len).next_multiple_of(BLOCK) - start;
    let mut args = Blobs::new(SevDbg {
        src: U64::new(start),
        len: U32::new(wide as u32),
        ..SevDbg::default()
    });
    args.head.dst = args.push(&vec![0; wide as usize]);
    let mut data = args.to_bytes();
    engine.command(uapi::DBG_DECRYPT, &mut data)?;
    Ok((
        data.split_off(size_of::<SevDbg>()),
        (guest - start) as usize,
    ))
}

fn encrypt_blocks(engine: &mut Engine, guest: u64, plain: &[u8]) -> Result<(), Failed> {
    let mut args = Blobs::new(SevDbg {
        dst: U64::new(guest - guest % BLOCK),
        len: U32::new(plain.len() as u32),
        ..SevDbg::default()
    });
    args.head.src = args.push(plain);
    engine.command(uapi::DBG_ENCRYPT, &mut args.to_bytes())
}

/// The checks, and then each piece.
fn pieces(
    state: &mut State,
    call: &Call<'_>,
    mut body: impl FnMut(&mut Engine, &Piece) -> Result<(), Failed>,
) -> Answer {
    ensure(state.sev.is_active(), SEV)?;
    let args: SevDbg = call.read(COPY)?;
    let (mut src, mut dst) = (args.src.get(), args.dst.get());
    let mut left = u64::from(args.len.get());
    ensure(left != 0 && src != 0 && dst != 0, GIVEN)?;
    let wraps = src.checked_add(left).is_none() || dst.checked_add(left).is_none();
    ensure(!wraps, WRAP)?;
    while left != 0 {
        let piece = Piece::first(src, dst, left);
        // Destinations are written when it is known what to, so that nothing else is.
        for address in [src, dst] {
            pin::for_command(state, call, (address, piece.len), Use::Read, (WRAP, PINNED))?;
        }
        state.sev.require_fd(call.process, SEV_FD)?;
        body(state.sev.engine(SEV)?, &piece)?;
        (src, dst, left) = (src + piece.len, dst + piece.len, left - piece.len);
    }
    Ok(Sent::Yes)
}

fn or_unpinned<T, E>(done: Result<T, E>) -> Result<T, Check> {
    done.map_err(|_| PINNED)
}

pub(super) fn decrypt(state: &mut State, call: &Call<'_>) -> Answer {
    pieces(state, call, |engine, piece| {
        let (blocks, from) = decrypt_blocks(engine, piece.src, piece.len)?;
        let plain = &blocks[from..from + piece.len as usize];
        Ok(or_unpinned(call.process.write(piece.dst, plain))?)
    })
}

pub(super) fn encrypt(state: &mut State, call: &Call<'_>) -> Answer {
    pieces(state, call, |engine, piece| {
        let (mut blocks, from) = decrypt_blocks(engine, piece.dst, piece.len)?;
        let plain = &mut blocks[from..from + piece.len as usize];
        or_unpinned(call.process.read(piece.src, plain))?;
        encrypt_blocks(engine, piece.dst, &blocks)
    })
}
