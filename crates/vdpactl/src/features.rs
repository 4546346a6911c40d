//! Names of feature bits, as iproute2 prints them (uapi-spec 7.4).

use serde_json::Value;
use vdpa_core::feature_names::{BLOCK, NET, name};
use vdpa_core::features::{Bit, Features};

/// Which bits have names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// Bits of the transport and of network devices.
    Net,
    /// Bits of the transport and of block devices. iproute2 has no names for the latter, so they are used only in output that it does
    /// not have.
    Block,
    /// Bits of the transport only.
    Transport,
    /// None (`--no-nice-names`).
    Numbers,
}

impl Names {
    fn name(self, bit: u8) -> Option<&'static str> {
        match self {
            Self::Numbers => None,
            Self::Net => name(NET, Bit(bit)),
            Self::Block => name(BLOCK, Bit(bit)),
            Self::Transport => name(0, Bit(bit)),
        }
    }

    /// The names of the bits of `features`, each after a space; `bit_N` for a bit without a name.
    pub(crate) fn plain(self, features: Features) -> String {
        bits(features)
            .map(|bit| match self.name(bit) {
                Some(name) => format!(" {name}"),
                None => format!(" bit_{bit}"),
            })
            .collect()
    }

    /// The names of the bits of `features`; the number for a bit without a name.
    pub(crate) fn json(self, features: Features) -> Value {
        bits(features).map(|bit| self.name(bit).map_or_else(|| Value::from(bit), Value::from)).collect()
    }
}

fn bits(features: Features) -> impl Iterator<Item = u8> {
    (0..64).filter(move |bit| features.has(Bit(*bit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_simulator_has_the_names_iproute2_gives_it() {
        assert_eq!(
            Names::Net.plain(Features(0x3_0883_0028)),
            " MTU MAC STATUS CTRL_VQ CTRL_MAC_ADDR ANY_LAYOUT VERSION_1 ACCESS_PLATFORM"
        );
    }

    #[test]
    fn bits_without_a_name_are_numbers() {
        let features = Features::of(&[Bit(3), Bit(30), Bit(32), Bit(50)]);
        assert_eq!(Names::Transport.plain(features), " bit_3 bit_30 VERSION_1 bit_50");
        assert_eq!(Names::Transport.json(features).to_string(), r#"[3,30,"VERSION_1",50]"#);
        assert_eq!(Names::Numbers.json(features).to_string(), "[3,30,32,50]");
    }
}
