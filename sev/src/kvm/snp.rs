//! The launch of SNP guests.

use kvm_ops::{Error, Field, Gfn, Host, PAGE_SIZE, Result, Step};
use zerocopy::little_endian::U64;

use super::blob::{blob, blob_mut, read, write};
use super::layout::{SnpLaunchFinish, SnpLaunchStart, SnpLaunchUpdate};
use super::legacy::with_guest;
use crate::SevVm;
use crate::command::Command;
use crate::launch::{Finish, PageType, Start};
use crate::rules::{EINVAL, EIO, ENOTTY, errno};
use crate::status::{Failure, Operation};

/// Lengths of an ID block and of its authentication (SNP ABI, 8.17).
const ID_BLOCK: u64 = 96;
const ID_AUTH: u64 = 4096;

pub(super) fn launch_start<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SnpLaunchStart = read(data)?;
    if args.flags.get() != 0 {
        return Err(Error::Invalid(Field::Flags, args.flags.get().into()));
    }
    let start = Start {
        policy: args.policy.get(),
        gosvw: args.gosvw,
        ..Start::default()
    };
    let mut context = vm.shared.context();
    let context = context.as_mut().ok_or(errno(EINVAL))?;
    vm.shared.start(context, &start).map_err(|error| {
        // The kernel forgets why there is no context page.
        match Failure::of(&error).map(|failure| failure.operation) {
            Some(Operation::Command(Command::SnpGctxCreate)) => errno(ENOTTY),
            _ => error,
        }
    })
}

/// Adds pages one by one; the structure tells how far it came. Every failure to add one is EIO.
pub(super) fn launch_update<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let mut args: SnpLaunchUpdate = read(data)?;
    let (first, len) = (args.gfn_start.get(), args.len.get());
    let kind = match args.kind {
        1 => PageType::Normal,
        3 => PageType::Zero,
        4 => PageType::Unmeasured,
        5 => PageType::Secrets,
        6 => PageType::Cpuid,
        other => return Err(Error::Invalid(Field::Flags, other.into())),
    };
    if args.flags.get() != 0 {
        return Err(Error::Invalid(Field::Flags, args.flags.get().into()));
    }
    let pages = len / PAGE_SIZE;
    if len == 0 || len % PAGE_SIZE != 0 || first.checked_add(pages).is_none() {
        return Err(Error::Invalid(Field::Size, len));
    }
    // A launch that has ended is firmware's to refuse.
    let begun = matches!(vm.shared.step(), Step::Initialized | Step::Runnable);
    if !begun || !vm.shared.memory().has_slot(Gfn::new(first), pages) {
        return Err(errno(EINVAL));
    }
    let has_contents = kind != PageType::Zero;
    if has_contents {
        blob(data, args.uaddr.get(), len)?;
    }
    for done in 0..pages {
        let mut contents = [0; PAGE_SIZE as usize];
        let at = args.uaddr.get();
        if has_contents {
            contents.copy_from_slice(blob(data, at, PAGE_SIZE)?);
        }
        let gfn = Gfn::new(first + done);
        let added = with_guest(vm, |context| {
            vm.shared.snp_update(context, gfn, &mut contents, kind)
        });
        if let Err(error) = added {
            if kind == PageType::Cpuid {
                blob_mut(data, at, PAGE_SIZE)?.copy_from_slice(&contents);
            }
            return Err(match error {
                Error::Firmware(_) => error,
                Error::WrongState(_) => errno(EINVAL),
                _ => errno(EIO),
            });
        }
        args.gfn_start = U64::new(first + done + 1);
        args.len = U64::new(len - (done + 1) * PAGE_SIZE);
        if has_contents {
            args.uaddr = U64::new(at + PAGE_SIZE);
        }
        write(data, &args)?;
    }
    Ok(())
}

pub(super) fn launch_finish<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SnpLaunchFinish = read(data)?;
    if args.flags.get() != 0 {
        return Err(Error::Invalid(Field::Flags, args.flags.get().into()));
    }
    with_guest(vm, |_| Ok(()))?;
    let id_block = if args.id_block_en != 0 {
        let block = blob(data, args.id_block.get(), ID_BLOCK)?;
        let auth = blob(data, args.id_auth.get(), ID_AUTH)?;
        Some((block.into(), auth.into()))
    } else {
        None
    };
    let finish = Finish {
        author_key: id_block.is_some() && args.auth_key_en != 0,
        id_block,
        vcek_disabled: args.vcek_disabled != 0,
        host_data: args.host_data,
    };
    vm.shared.finalize(&finish)
}
