package fastpath

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
)

// How things are called in Changes, and in which order they come.

func (a attachment) String() string { return fmt.Sprintf("%s link %d", a.program, a.link) }

func (a attachment) compare(b attachment) int {
	return cmp.Or(cmp.Compare(a.program, b.program), cmp.Compare(a.link, b.link))
}

func (u unit) String() string { return netip.AddrPortFrom(netip.AddrFrom4(u.IP), u.Port).String() }

func (u unit) compare(v unit) int { return cmp.Or(compareIP(u.IP, v.IP), cmp.Compare(u.Port, v.Port)) }

func ipString(ip [4]byte) string { return netip.AddrFrom4(ip).String() }

func compareIP(a, b [4]byte) int { return bytes.Compare(a[:], b[:]) }

func macString(k uint64) string {
	return net.HardwareAddr(binary.LittleEndian.AppendUint64(nil, k)[:6]).String()
}
