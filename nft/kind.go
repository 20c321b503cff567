package nft

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"

	"github.com/egret-project/egret/egress"
)

// kind is the type of a key or a value: that of nft, and how it is printed and encoded.
type kind struct {
	nftables.SetDatatype
	order binaryutil.ByteOrder // nil: there is none, as in the value of a set
	parts []kind               // of a concatenation: each begins at a multiple of 4 bytes
	// interval: a value is the first and the last of a range, and parts are those of both.
	interval bool
}

var (
	address4 = kind{SetDatatype: nftables.TypeIPAddr, order: binaryutil.BigEndian}
	address6 = kind{SetDatatype: nftables.TypeIP6Addr, order: binaryutil.BigEndian}
	index    = kind{SetDatatype: nftables.TypeIFIndex, order: binaryutil.NativeEndian}
	link     = kind{SetDatatype: nftables.TypeIFName, order: binaryutil.BigEndian} // padded with zeros
	ether    = kind{SetDatatype: nftables.TypeEtherAddr, order: binaryutil.BigEndian}
	mark     = kind{SetDatatype: nftables.TypeMark, order: binaryutil.NativeEndian}
	protocol = kind{SetDatatype: nftables.TypeEtherType, order: binaryutil.BigEndian}
	port     = kind{SetDatatype: nftables.TypeInetService, order: binaryutil.BigEndian}

	// Of anonymous sets.
	addressType = kind{SetDatatype: nftables.TypeFIBAddr, order: binaryutil.NativeEndian}
	transport   = kind{SetDatatype: nftables.TypeInetProto, order: binaryutil.BigEndian}
	icmpType    = kind{SetDatatype: nftables.TypeICMPType, order: binaryutil.BigEndian}
	icmpv6Type  = kind{SetDatatype: nftables.TypeICMP6Type, order: binaryutil.BigEndian}
	// as nft(8) has strings, which prints it then
	linkKind = kind{SetDatatype: nftables.TypeIFName, order: binaryutil.NativeEndian}

	linked4, linked6 = concat(link, address4), concat(link, address6)
	peer4, peer6     = concat(address4, ether), concat(address6, ether)
	via4, via6       = concat(address4, ether, index), concat(address6, ether, index)
	came4, came6     = concat(address4, index), concat(address6, index)
	sender4, sender6 = concat(ether, address4, mark), concat(ether, address6, mark)
	markPair         = concat(mark, mark)
	unit4, unit6     = concat(address4, port), concat(address6, port)
	origin4, origin6 = concat(ether, address4, port), concat(ether, address6, port)
	block4, block6   = rangeOf(unit4), rangeOf(unit6)
)

func concat(parts ...kind) kind {
	var types []nftables.SetDatatype
	for _, p := range parts {
		types = append(types, p.SetDatatype)
	}
	return kind{SetDatatype: nftables.MustConcatSetType(types...), parts: parts}
}

// rangeOf returns the ranges of a concatenation, of which the last part alone differs.
func rangeOf(k kind) kind {
	k.parts, k.interval = append(k.parts[:len(k.parts):len(k.parts)], k.parts...), true
	k.Bytes *= 2
	return k
}

// each calls f for each part of a key or value of the kind.
func (k kind) each(s string, f func(k kind, s string)) {
	for _, p := range k.parts {
		n := min(int(p.Bytes), len(s))
		f(p, s[:n])
		s = s[min((n+3)&^3, len(s)):]
	}
}

// wire turns a key or value from network byte order into that of the kernel, and back.
func (k kind) wire(s string) string {
	if len(k.parts) > 0 {
		var b strings.Builder
		k.each(s, func(k kind, s string) { b.WriteString(pad(k.wire(s))) })
		return b.String()
	}
	if k.order != binaryutil.NativeEndian || len(s) != 4 {
		return s
	}
	return string(native(uint32(markOf(s))))
}

// pad fills a part of a concatenation up.
func pad(s string) string { return s + strings.Repeat("\x00", -len(s)&3) }

// print prints a key or value as nft takes it.
func (k kind) print(s string) string {
	switch {
	case len(k.parts) > 0:
		var words []string
		k.each(s, func(k kind, s string) { words = append(words, k.print(s)) })
		if n := len(words) / 2; k.interval {
			words = append(words[:n-1:n-1], words[n-1]+"-"+words[2*n-1])
		}
		return strings.Join(words, " . ")
	case k.order == binaryutil.NativeEndian:
		return fmt.Sprintf("0x%08x", uint32(markOf(s)))
	case k.Name == port.Name:
		return strconv.Itoa(int(binary.BigEndian.Uint16([]byte(s))))
	case k.Name == protocol.Name:
		return protocols[s]
	case k.Name == link.Name:
		return fmt.Sprintf("%q", strings.TrimRight(s, "\x00"))
	case k.Name == ether.Name:
		return net.HardwareAddr(s).String()
	}
	a, _ := netip.AddrFromSlice([]byte(s))
	return a.String()
}

// markOf returns the mark in the value or key of an element.
func markOf(s string) egress.Mark { return egress.Mark(binary.BigEndian.Uint32([]byte(s))) }
