package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// kind is the type of a key or a value: that of nft, and how it is printed and encoded.
type kind struct {
	nftables.SetDatatype
	order binaryutil.ByteOrder // nil: there is none, as in the value of a set
}

var (
	address4 = kind{nftables.TypeIPAddr, binaryutil.BigEndian}
	address6 = kind{nftables.TypeIP6Addr, binaryutil.BigEndian}
	// linkAddress4 is the name of a link, padded with zeros, and an address.
	linkAddress4 = kind{nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr), binaryutil.BigEndian}
	mark         = kind{nftables.TypeMark, binaryutil.NativeEndian}
	protocol     = kind{nftables.TypeEtherType, binaryutil.BigEndian}
	// markPair are two marks.
	markPair = kind{nftables.MustConcatSetType(nftables.TypeMark, nftables.TypeMark), binaryutil.NativeEndian}
)

// wire turns a key or value from network byte order into that of the kernel, and back.
func (k kind) wire(s string) string {
	if k.order != binaryutil.NativeEndian {
		return s
	}
	var b []byte
	for ; len(s) >= 4; s = s[4:] {
		b = append(b, native(uint32(markOf(s)))...)
	}
	return string(b) + s
}

// print prints a key or value as nft takes it.
func (k kind) print(s string) string {
	if k.order == binaryutil.NativeEndian {
		var marks []string
		for ; len(s) >= 4; s = s[4:] {
			marks = append(marks, fmt.Sprintf("0x%08x", uint32(markOf(s))))
		}
		return strings.Join(marks, " . ")
	}
	if len(s) == 2 {
		return protocols[s]
	}
	if len(s) > unix.IFNAMSIZ {
		return fmt.Sprintf("%q . %s", strings.TrimRight(s[:unix.IFNAMSIZ], "\x00"), address4.print(s[unix.IFNAMSIZ:]))
	}
	a, _ := netip.AddrFromSlice([]byte(s))
	return a.String()
}

// markOf returns the mark in the value or key of an element.
func markOf(s string) egress.Mark { return egress.Mark(binary.BigEndian.Uint32([]byte(s))) }
