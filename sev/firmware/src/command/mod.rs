//! Commands and their buffers.
//!
//! Each command has one structure, which [`Platform::run`](crate::Platform::run) takes. Its fields
//! have the names of the specification in lower case, in its order and at its offsets; what the
//! firmware writes is read from the same structure afterwards.
//!
//! ```
//! use soft_amd_sp::{Platform, command::*};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let p = Platform::builder().seed(1).build()?;
//! p.run(&mut Init::default()).ok()?;
//! let mut status = PlatformStatus::default();
//! p.run(&mut status).ok()?;
//! assert_eq!((status.api_major, status.api_minor, status.state), (1, 55, 1));
//! # Ok(())
//! # }
//! ```
//!
//! Integers are little-endian of exactly the field's width ([`U16`], [`U32`], [`U64`]), so a value
//! that is too wide does not fit the type. Flags, policies, permissions and page addresses have
//! types whose constructors refuse what the field cannot hold ([`FieldError`] names the value).
//! Reserved bytes are [`Reserved`], which is always zero. A field that does not exist, and a number
//! that is too wide, do not compile:
//!
//! ```compile_fail,E0560
//! use soft_amd_sp::command::*;
//! let activate = SnpActivate { gctx_padr: Default::default(), asid: 1.into() };
//! ```
//!
//! ```compile_fail,E0277
//! use soft_amd_sp::command::*;
//! let activate = Activate { handle: 1.into(), asid: 0x1_0000_0000_u64.into() };
//! ```
//!
//! ```
//! use soft_amd_sp::command::*;
//! let error = InitFlags::new(0x21).unwrap_err();
//! assert_eq!(error.to_string(), "InitFlags 0x21 has the reserved bits 0x20");
//! let error = PageAddress::new(0x1008).unwrap_err();
//! assert_eq!(error.to_string(), "address 0x1008 is not a multiple of 0x1000");
//! ```
//!
//! Malformed buffers are made on purpose only: with `from_raw` of a field's type, or as bytes for
//! [`Platform::command`](crate::Platform::command).
//!
//! # Sources
//!
//! Numbers and layouts: Linux `include/linux/psp-sev.h` and `include/uapi/linux/psp-sev.h`, and for
//! SEV and SEV-ES AMD's `sev-tool` (`src/sevapi.h`). What neither has is listed in
//! `docs/inferred.md`.

mod address;
pub(crate) mod bits;
mod guest;
pub(crate) mod layout;
mod migrate;
mod platform;
mod policy;
mod snp_guest;
mod snp_platform;
mod swap;
mod word;

pub use address::{PageAddress, SizedPage, VmplPerms};
pub use bits::FieldError;
pub use guest::*;
pub use layout::{Field, Length, Reserved};
pub use migrate::*;
pub use platform::*;
pub use policy::{SevPolicy, SnpPolicy};
pub use snp_guest::*;
pub use snp_platform::*;
pub use swap::*;
pub use zerocopy::little_endian::{U16, U32, U64};

pub(crate) use bits::bits;
pub(crate) use layout::{Layout, layout};
pub(crate) use word::word;

use std::fmt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The buffer of a command, as [`Platform::run`](crate::Platform::run) takes it.
///
/// It is plain bytes (`zerocopy`): [`as_bytes`](IntoBytes::as_bytes) gives what the mailbox reads.
/// Only the structures of this module implement it.
pub trait CommandStruct:
    FromBytes + IntoBytes + Immutable + KnownLayout + Default + Layout
{
    /// The command.
    const COMMAND: Command;
}

macro_rules! commands {
    ($($name:ident $Struct:ident = $id:literal $doc:literal)*) => {
        /// A command of the AMD SP, by the number in bits 26:16 of the command register.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        #[repr(u32)]
        pub enum Command {
            $(#[doc = $doc] $name = $id,)*
        }

        impl Command {
            /// Every command, in the order of this list.
            pub const ALL: &'static [Command] = &[$(Command::$name),*];

            /// The command with this number.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Command::$name),)*
                    _ => None,
                }
            }

            /// The name, as in the manuals.
            pub fn name(self) -> &'static str {
                match self { $(Command::$name => stringify!($name),)* }
            }

            /// The purpose of the command, in one sentence.
            pub fn purpose(self) -> &'static str {
                match self { $(Command::$name => $doc,)* }
            }

            /// Length of the command buffer; 0 if there is none.
            pub fn buffer_len(self) -> usize {
                match self { $(Command::$name => size_of::<$Struct>(),)* }
            }

            /// Fields of the command buffer; bytes outside of them are reserved and must be 0.
            pub fn fields(self) -> &'static [Field] {
                match self { $(Command::$name => <$Struct as Layout>::FIELDS,)* }
            }
        }

        $(impl CommandStruct for $Struct { const COMMAND: Command = Command::$name; })*
    };
}

commands! {
    INIT Init = 0x01 "Initialises the platform for SEV and SEV-ES."
    SHUTDOWN Shutdown = 0x02 "Ends SEV and SEV-ES; every guest is forgotten."
    FACTORY_RESET FactoryReset = 0x03 "Gives the platform a new identity."
    PLATFORM_STATUS PlatformStatus = 0x04 "Reports version, state and number of guests."
    PEK_GEN PekGen = 0x05 "Makes a new platform endorsement key, signed by the platform itself."
    PEK_CSR PekCsr = 0x06 "Exports a request to certify the platform endorsement key."
    PEK_CERT_IMPORT PekCertImport = 0x07 "Gives the platform to an owner."
    PDH_CERT_EXPORT PdhCertExport = 0x08
        "Exports the Diffie-Hellman key and its certificate chain."
    PDH_GEN PdhGen = 0x09 "Makes a new Diffie-Hellman key."
    DF_FLUSH DfFlush = 0x0a "Flushes the data fabric's write buffers."
    DOWNLOAD_FIRMWARE DownloadFirmware = 0x0b "Replaces the firmware."
    GET_ID GetId = 0x0c "Reports the identity of the chip."
    INIT_EX InitEx = 0x0d "INIT with the persistent data in a buffer."
    NOP Nop = 0x0e "Does nothing."
    DECOMMISSION Decommission = 0x20 "Forgets a guest."
    ACTIVATE Activate = 0x21 "Binds a guest to an ASID."
    DEACTIVATE Deactivate = 0x22 "Unbinds a guest from its ASID."
    GUEST_STATUS GuestStatus = 0x23 "Reports policy, ASID and state of a guest."
    COPY CopyMemory = 0x24 "Copies guest memory to another place of the same guest."
    ACTIVATE_EX ActivateEx = 0x25 "ACTIVATE for some cores."
    LAUNCH_START LaunchStart = 0x30 "Creates a guest to be launched."
    LAUNCH_UPDATE_DATA LaunchUpdateData = 0x31 "Measures and encrypts memory of a guest."
    LAUNCH_UPDATE_VMSA LaunchUpdateVmsa = 0x32
        "Measures and encrypts the register state of a vCPU."
    LAUNCH_MEASURE LaunchMeasure = 0x33 "Returns the launch measurement."
    LAUNCH_UPDATE_SECRET LaunchSecret = 0x34
        "Puts a guest owner's secret into guest memory."
    LAUNCH_FINISH LaunchFinish = 0x35 "Ends the launch; the guest may run."
    ATTESTATION Attestation = 0x36
        "Returns a report signed by the platform endorsement key."
    SEND_START SendStart = 0x40 "Begins to send a guest to another platform."
    SEND_UPDATE_DATA SendUpdateData = 0x41 "Encrypts guest memory for the other platform."
    SEND_UPDATE_VMSA SendUpdateVmsa = 0x42 "Encrypts register state for the other platform."
    SEND_FINISH SendFinish = 0x43 "Ends sending; the guest may no longer run here."
    SEND_CANCEL SendCancel = 0x44 "Gives up sending; the guest runs on."
    RECEIVE_START ReceiveStart = 0x50 "Creates a guest to be received."
    RECEIVE_UPDATE_DATA ReceiveUpdateData = 0x51 "Puts received memory into the guest."
    RECEIVE_UPDATE_VMSA ReceiveUpdateVmsa = 0x52
        "Puts received register state into the guest."
    RECEIVE_FINISH ReceiveFinish = 0x53 "Ends receiving; the guest may run."
    DBG_DECRYPT DbgDecrypt = 0x60
        "Decrypts guest memory for the host, if the policy allows."
    DBG_ENCRYPT DbgEncrypt = 0x61
        "Writes guest memory for the host, if the policy allows."
    SNP_INIT SnpInit = 0x81 "Initialises the platform for SEV-SNP."
    SNP_SHUTDOWN SnpShutdown = 0x82 "Ends SEV-SNP."
    SNP_PLATFORM_STATUS SnpPlatformStatus = 0x83
        "Reports version, state and security level."
    SNP_DF_FLUSH SnpDfFlush = 0x84 "Flushes the data fabric's write buffers."
    SNP_INIT_EX SnpInitEx = 0x85 "SNP_INIT with options."
    SNP_SHUTDOWN_EX SnpShutdownEx = 0x86 "SNP_SHUTDOWN with options."
    SNP_DECOMMISSION SnpDecommission = 0x90 "Forgets a guest and unbinds its ASID."
    SNP_ACTIVATE SnpActivate = 0x91 "Binds a guest to an ASID."
    SNP_GUEST_STATUS SnpGuestStatus = 0x92 "Reports policy, ASID and state of a guest."
    SNP_GCTX_CREATE SnpGctxCreate = 0x93 "Creates a guest context in a page."
    SNP_GUEST_REQUEST SnpGuestRequest = 0x94 "Answers an encrypted message of a guest."
    SNP_ACTIVATE_EX SnpActivateEx = 0x95 "SNP_ACTIVATE for some cores."
    SNP_LAUNCH_START SnpLaunchStart = 0xa0 "Begins the launch of a guest."
    SNP_LAUNCH_UPDATE SnpLaunchUpdate = 0xa1 "Measures and encrypts a page of a guest."
    SNP_LAUNCH_FINISH SnpLaunchFinish = 0xa2 "Ends the launch; the guest may run."
    SNP_DBG_DECRYPT SnpDbgDecrypt = 0xb0
        "Decrypts a guest page for the host, if the policy allows."
    SNP_DBG_ENCRYPT SnpDbgEncrypt = 0xb1
        "Writes a guest page for the host, if the policy allows."
    SNP_PAGE_SWAP_OUT SnpPageSwapOut = 0xc0 "Moves a page out of memory."
    SNP_PAGE_SWAP_IN SnpPageSwapIn = 0xc1 "Moves a page into memory."
    SNP_PAGE_MOVE SnpPageMove = 0xc2 "Moves a guest page to another place in memory."
    SNP_PAGE_MD_INIT SnpPageMdInit = 0xc3 "Makes a page for swap records."
    SNP_PAGE_SET_STATE SnpPageSetState = 0xc6 "Fixes pages to the hypervisor."
    SNP_PAGE_RECLAIM SnpPageReclaim = 0xc7 "Gives a page back to the hypervisor."
    SNP_PAGE_UNSMASH SnpPageUnsmash = 0xc8 "Joins 512 small pages to a large one."
    SNP_CONFIG SnpConfig = 0xc9 "Sets the reported security level."
    SNP_DOWNLOAD_FIRMWARE_EX SnpDownloadFirmwareEx = 0xca
        "Replaces the firmware while guests run."
    SNP_COMMIT SnpCommit = 0xcb "Makes the current firmware the oldest to go back to."
    SNP_VLEK_LOAD SnpVlekLoad = 0xcd "Loads a versioned loaded endorsement key."
    SNP_FEATURE_INFO SnpFeatureInfo = 0xce "Reports the features of the firmware."
}

impl Command {
    /// Returns true if the command belongs to SEV-SNP.
    pub fn is_snp(self) -> bool {
        self as u32 >= 0x80
    }

    /// Returns true if the firmware writes into the command buffer.
    pub fn writes_buffer(self) -> bool {
        self.fields().iter().any(|f| f.out)
    }

    /// The field of this name.
    pub(crate) fn field(self, name: &str) -> Option<&'static Field> {
        self.fields().iter().find(|f| f.name == name)
    }

    /// Returns true if every reserved byte of a buffer is 0.
    pub(crate) fn reserved_is_zero(self, buffer: &[u8]) -> bool {
        buffer.iter().enumerate().all(|(i, byte)| {
            *byte == 0
                || self
                    .fields()
                    .iter()
                    .any(|f| (f.offset..f.offset + f.len).contains(&i))
        })
    }
}

impl From<Command> for u32 {
    fn from(command: Command) -> u32 {
        command as u32
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_ordered_inside_the_buffer_and_do_not_overlap() {
        for command in Command::ALL {
            let mut end = 0;
            for field in command.fields() {
                assert!(field.offset >= end, "{command} {}", field.name);
                end = field.offset + field.len;
            }
            assert!(end <= command.buffer_len(), "{command}");
        }
    }

    #[test]
    fn numbers_lead_back_to_their_command() {
        for id in 0..0x800 {
            if let Some(command) = Command::from_id(id) {
                assert_eq!(command as u32, id);
            }
        }
        assert_eq!(Command::from_id(0), None);
    }
}
