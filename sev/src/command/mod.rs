//! Commands of the AMD SP: numbers, and buffers as the firmware reads them.
//!
//! Layouts: Linux `include/linux/psp-sev.h`. Every structure asserts its size and its offsets.

mod legacy;
mod migrate;
mod snp;

pub use legacy::*;
pub use migrate::*;
pub use snp::*;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A command buffer.
pub trait Buffer: IntoBytes + FromBytes + Immutable + KnownLayout {
    /// The commands that take it.
    const COMMANDS: &'static [Command];
}

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident = $id:literal $text:literal)*) => {
        /// A command by its number, the one that Linux calls `SEV_CMD_*`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum Command { $($(#[$doc])* $name = $id,)* }

        impl Command {
            /// Every command that this back end issues, by number.
            pub const ALL: &'static [Command] = &[$(Self::$name),*];

            /// The name, as the manuals have it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The command of that number.
            pub fn from_number(number: u32) -> Option<Self> {
                Self::ALL.iter().copied().find(|c| *c as u32 == number)
            }
        }
    };
}

numbers! {
    /// Exports the platform's Diffie-Hellman certificate and its chain.
    PdhCertExport = 0x08 "PDH_CERT_EXPORT"
    /// Flushes the data fabric; released ASIDs may be bound again.
    DfFlush = 0x0a "DF_FLUSH"
    /// Forgets a guest.
    Decommission = 0x20 "DECOMMISSION"
    /// Binds a guest to an ASID.
    Activate = 0x21 "ACTIVATE"
    /// Unbinds it.
    Deactivate = 0x22 "DEACTIVATE"
    /// Reports policy, ASID and state.
    GuestStatus = 0x23 "GUEST_STATUS"
    /// Creates a guest to be launched.
    LaunchStart = 0x30 "LAUNCH_START"
    /// Measures and encrypts memory.
    LaunchUpdateData = 0x31 "LAUNCH_UPDATE_DATA"
    /// Measures and encrypts a vCPU's register state.
    LaunchUpdateVmsa = 0x32 "LAUNCH_UPDATE_VMSA"
    /// Returns the measurement.
    LaunchMeasure = 0x33 "LAUNCH_MEASURE"
    /// Puts the guest owner's secret into guest memory.
    LaunchUpdateSecret = 0x34 "LAUNCH_UPDATE_SECRET"
    /// Ends the launch.
    LaunchFinish = 0x35 "LAUNCH_FINISH"
    /// Returns a signed report of the launch.
    Attestation = 0x36 "ATTESTATION"
    /// Begins to send a guest.
    SendStart = 0x40 "SEND_START"
    /// Packs memory for another platform.
    SendUpdateData = 0x41 "SEND_UPDATE_DATA"
    /// Packs a vCPU's register state for another platform.
    SendUpdateVmsa = 0x42 "SEND_UPDATE_VMSA"
    /// Gives the guest up here.
    SendFinish = 0x43 "SEND_FINISH"
    /// Keeps it here.
    SendCancel = 0x44 "SEND_CANCEL"
    /// Creates a guest to be received.
    ReceiveStart = 0x50 "RECEIVE_START"
    /// Unpacks memory.
    ReceiveUpdateData = 0x51 "RECEIVE_UPDATE_DATA"
    /// Unpacks a vCPU's register state.
    ReceiveUpdateVmsa = 0x52 "RECEIVE_UPDATE_VMSA"
    /// Ends receiving.
    ReceiveFinish = 0x53 "RECEIVE_FINISH"
    /// Decrypts guest memory for the host.
    DbgDecrypt = 0x60 "DBG_DECRYPT"
    /// Encrypts guest memory for the host.
    DbgEncrypt = 0x61 "DBG_ENCRYPT"
    /// Flushes the data fabric.
    SnpDfFlush = 0x84 "SNP_DF_FLUSH"
    /// Forgets a guest and unbinds its ASID.
    SnpDecommission = 0x90 "SNP_DECOMMISSION"
    /// Binds a guest to an ASID.
    SnpActivate = 0x91 "SNP_ACTIVATE"
    /// Reports policy, ASID and state.
    SnpGuestStatus = 0x92 "SNP_GUEST_STATUS"
    /// Creates a guest context.
    SnpGctxCreate = 0x93 "SNP_GCTX_CREATE"
    /// Answers an encrypted message of a guest.
    SnpGuestRequest = 0x94 "SNP_GUEST_REQUEST"
    /// Begins the launch.
    SnpLaunchStart = 0xa0 "SNP_LAUNCH_START"
    /// Measures and encrypts a page.
    SnpLaunchUpdate = 0xa1 "SNP_LAUNCH_UPDATE"
    /// Ends the launch.
    SnpLaunchFinish = 0xa2 "SNP_LAUNCH_FINISH"
    /// Encrypts a page of a guest for the host to keep, and makes its record.
    SnpPageSwapOut = 0xc0 "SNP_PAGE_SWAP_OUT"
    /// Brings such a page back, once.
    SnpPageSwapIn = 0xc1 "SNP_PAGE_SWAP_IN"
    /// Makes a page of records.
    SnpPageMdInit = 0xc3 "SNP_PAGE_MD_INIT"
    /// Makes an immutable page one that RMPUPDATE may change.
    SnpPageReclaim = 0xc7 "SNP_PAGE_RECLAIM"
}

/// Declares a buffer: the commands that take it, its size, and `offset name: type` for each field,
/// gaps included. The size and every offset are asserted.
macro_rules! buffer {
    (
        $(#[$doc:meta])*
        $Name:ident [$($Command:ident),+] $size:literal { $($offset:literal $field:ident: $ty:ty,)* }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
        #[derive(zerocopy::KnownLayout)]
        #[repr(C)]
        #[allow(missing_docs)] // Each is the field of its name in psp-sev.h.
        pub struct $Name { $(pub $field: $ty,)* }

        const _: () = {
            assert!(core::mem::size_of::<$Name>() == $size);
            $(assert!(core::mem::offset_of!($Name, $field) == $offset);)*
        };

        impl crate::command::Buffer for $Name {
            const COMMANDS: &'static [crate::command::Command] =
                &[$(crate::command::Command::$Command),+];
        }
    };
}
pub(crate) use buffer;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_those_of_the_software_firmware() {
        for command in Command::ALL {
            let theirs = soft_amd_sp::Command::from_id(*command as u32).unwrap();
            assert_eq!(theirs.name(), command.name());
            assert_eq!(Command::from_number(*command as u32), Some(*command));
        }
        assert_eq!(Command::from_number(0), None);
    }

    /// A layout typed wrongly twice would pass its own assertions: the other side has its own.
    #[test]
    fn buffers_are_as_long_as_the_software_firmware_reads_them() {
        fn check<B: Buffer>() -> usize {
            for command in B::COMMANDS {
                let theirs = soft_amd_sp::Command::from_id(*command as u32).unwrap();
                assert_eq!(theirs.buffer_len(), core::mem::size_of::<B>(), "{theirs}");
            }
            B::COMMANDS.len()
        }
        let checked = [
            check::<Handle>(),
            check::<Activate>(),
            check::<GuestStatus>(),
            check::<LaunchStart>(),
            check::<Update>(),
            check::<LaunchSecret>(),
            check::<Attestation>(),
            check::<Debug>(),
            check::<PdhCertExport>(),
            check::<SendStart>(),
            check::<TransportPacket>(),
            check::<ReceiveStart>(),
            check::<Context>(),
            check::<SnpActivate>(),
            check::<SnpGuestStatus>(),
            check::<SnpGuestRequest>(),
            check::<SnpLaunchStart>(),
            check::<SnpLaunchUpdate>(),
            check::<SnpLaunchFinish>(),
            check::<SnpPageSwapOut>(),
            check::<SnpPageSwapIn>(),
            check::<SnpPageMdInit>(),
            check::<SnpPageReclaim>(),
        ];
        let without_buffer = 2;
        assert_eq!(
            checked.iter().sum::<usize>() + without_buffer,
            Command::ALL.len()
        );
    }
}
