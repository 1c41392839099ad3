//! `_OSC` of the root bridge (ACPI 6.5 6.2.11.3, PCI Firmware 3.3 4.5.1). Where it is missing, Linux complains and leaves the
//! features of PCI Express alone.

use acpi_tables::Aml;
use acpi_tables::aml::{Arg, CreateDWordField, If, Method, NotEqual, Or, Path, Return, Uuid};

/// The interface of host bridges, and its revision.
const HOST_BRIDGE: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
const REVISION: u8 = 1;
/// Bits of the answer's first word.
const UNKNOWN_INTERFACE: u8 = 1 << 2;
const UNKNOWN_REVISION: u8 = 1 << 3;

/// The method. The third word, which features the system asks to control, is answered as it is: no firmware controls any.
pub(super) fn method() -> Vec<u8> {
    let (interface, revision, words) = (Arg(0), Arg(1), Arg(3));
    let status = Path::new("STAT");
    let field = CreateDWordField::new(&status, &words, &0_u8);
    let bridge = Uuid::new(HOST_BRIDGE);
    let other = NotEqual::new(&interface, &bridge);
    let newer = NotEqual::new(&revision, &REVISION);
    let unknown_interface = Or::new(&status, &status, &UNKNOWN_INTERFACE);
    let unknown_revision = Or::new(&status, &status, &UNKNOWN_REVISION);
    let not_this = If::new(&other, vec![&unknown_interface]);
    let not_now = If::new(&newer, vec![&unknown_revision]);
    let answer = Return::new(&words);
    let mut bytes = Vec::new();
    let body: Vec<&dyn Aml> = vec![&field, &not_this, &not_now, &answer];
    Method::new("_OSC".into(), 4, true, body).to_aml_bytes(&mut bytes);
    bytes
}
