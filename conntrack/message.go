package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// The messages and attributes of linux/netfilter/nfnetlink_conntrack.h.
const (
	begin  = unix.NFNL_SUBSYS_CTNETLINK << 8 // of an entry that is there since just now
	get    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	remove = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2

	tupleOrig                   = 1
	tupleReply                  = 2
	status                      = 3
	protoInfo                   = 4
	mark                        = 8
	countersOrig, countersReply = 9, 10 // of both directions, with nf_conntrack_acct=1
	entryID                     = 12
	timestamps                  = 20 // with nf_conntrack_timestamp=1
	markMask                    = 21
	filter                      = 25 // since Linux 5.8

	tupleIP       = 1 // in a tuple
	tupleProtocol = 2

	tcpInfo  = 1 // in the protocol's own
	tcpState = 1 // in that
	timeWait = 7 // of linux/netfilter/nf_conntrack_tcp.h; what comes after it is CLOSE

	seenReply = 1 << 1 // in the status: IPS_SEEN_REPLY of linux/netfilter/nf_conntrack_common.h

	counterPackets, counterBytes = 1, 2 // in counters

	timestampStart, timestampStop = 1, 2 // in timestamps

	number          = 1 // in a tuple's protocol
	sourcePort      = 2
	destinationPort = 3
	icmpID          = 4
	icmpv6ID        = 7

	filterOrigFlags  = 1 // in a filter: which parts of the tuple of a direction count
	filterReplyFlags = 2

	headerLen = 4 // of struct nfgenmsg, before the attributes
)

// address is where one of a tuple is: its attribute, by family, and its flag in a filter (CTA_FILTER_F_*,
// net/netfilter/nf_internals.h).
type address struct {
	ipv4, ipv6 uint16
	flag       uint32
}

var (
	source      = address{1, 3, 1 << 0}
	destination = address{2, 4, 1 << 1}
)

// answerTimeout is how long a listing may take; one of a million entries takes seconds.
const answerTimeout = time.Minute

// errInterrupted says that the table changed while it was listed.
var errInterrupted = errors.New("the table of connections changes all the time")

func message(typ int, flags netlink.HeaderFlags, family byte, attributes []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | flags},
		Data:   append([]byte{family, 0, 0, 0}, attributes...),
	}
}

// question asks for the entries of a family that the filter matches.
func question(family byte, f Filter) (netlink.Message, error) {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	if f.Mask != 0 {
		e.Uint32(mark, uint32(f.Mark))
		e.Uint32(markMask, uint32(f.Mask))
	}
	original, reply := map[address]netip.Addr{source: f.Source}, map[address]netip.Addr{source: f.Destination, destination: f.Translated}
	encodeTuple(e, tupleOrig, original)
	encodeTuple(e, tupleReply, reply)
	if f.hasAddress() {
		e.Nested(filter, func(e *netlink.AttributeEncoder) error {
			e.ByteOrder = binary.NativeEndian
			e.Uint32(filterOrigFlags, flags(original))
			e.Uint32(filterReplyFlags, flags(reply))
			return nil
		})
	}
	attributes, err := e.Encode()
	if err != nil {
		return netlink.Message{}, fmt.Errorf("encoding netlink attributes: %w", err)
	}
	return message(get, netlink.Dump, family, attributes), nil
}

// flags say which of the addresses of a tuple count.
func flags(tuple map[address]netip.Addr) (all uint32) {
	for where, ip := range tuple {
		if ip.IsValid() {
			all |= where.flag
		}
	}
	return all
}

func encodeTuple(e *netlink.AttributeEncoder, n uint16, tuple map[address]netip.Addr) {
	if flags(tuple) == 0 {
		return
	}
	e.Nested(n, func(e *netlink.AttributeEncoder) error {
		e.Nested(tupleIP, func(e *netlink.AttributeEncoder) error {
			for where, ip := range tuple {
				if ip.Is4() {
					e.Bytes(where.ipv4, ip.AsSlice())
				} else if ip.IsValid() {
					e.Bytes(where.ipv6, ip.AsSlice())
				}
			}
			return nil
		})
		return nil
	})
}

// list calls found for each entry of a family that the kernel takes to be meant by the filter, with the attributes of
// its message. The error is errInterrupted when some may be missing.
func (t table) list(family byte, f Filter, found func(c Flow, attributes []byte)) error {
	q, err := question(family, f)
	if err != nil {
		return err
	}
	if err := t.nl.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	if _, err := t.nl.Send(q); err != nil {
		return err
	}
	interrupted := false
	for m, err := range t.nl.ReceiveIter() {
		if errors.Is(err, unix.EINTR) {
			return errInterrupted
		} else if err != nil {
			return err
		}
		interrupted = interrupted || m.Header.Flags&netlink.DumpInterrupted != 0
		if len(m.Data) < headerLen {
			return fmt.Errorf("netlink message of %d bytes", len(m.Data))
		}
		var c Flow
		if err := decode(m.Data[headerLen:], &c); err != nil {
			return err
		}
		found(c, m.Data[headerLen:])
	}
	if interrupted {
		return errInterrupted
	}
	return nil
}

// remove deletes the entry that the attributes are of. The error is unix.ENOENT when it is gone, also when another one
// has come in its place: they have its number.
func (t table) remove(family byte, attributes []byte) error {
	if err := t.nl.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	_, err := t.nl.Execute(message(remove, netlink.Acknowledge, family, attributes))
	return err
}

// decode reads what the attributes of an entry say into f, which is empty before.
func decode(attributes []byte, f *Flow) error {
	return each(attributes, func(typ uint16, value []byte) (err error) {
		switch typ {
		case mark:
			m, err := number32(value)
			f.Mark = egress.Mark(m)
			return err
		case tupleOrig:
			var other netip.Addr
			is, err := decodeTuple(value, &f.Source, &other)
			f.SourcePort = is.port()
			return err
		case tupleReply:
			is, err := decodeTuple(value, &f.Destination, &f.Translated)
			f.Protocol, f.DestinationPort, f.Port = is.protocol, is.source, is.destination
			return err
		case protoInfo:
			return each(value, func(typ uint16, value []byte) error {
				if typ != tcpInfo {
					return nil
				}
				return each(value, func(typ uint16, value []byte) error {
					if typ == tcpState && len(value) > 0 {
						f.Ended = value[0] == timeWait || value[0] == timeWait+1
					}
					return nil
				})
			})
		case entryID:
			f.ID, err = number32(value)
		case status:
			bits, err := number32(value)
			f.Replied = bits&seenReply != 0
			return err
		case countersOrig:
			f.Counted = true
			return decodeCount(value, &f.Sent)
		case countersReply:
			f.Counted = true
			return decodeCount(value, &f.Received)
		case timestamps:
			return each(value, func(typ uint16, value []byte) error {
				n, err := number64(value)
				switch {
				case err != nil || n == 0:
				case typ == timestampStart:
					f.Start = time.Unix(0, int64(n))
				case typ == timestampStop:
					f.Stop = time.Unix(0, int64(n))
				}
				return err
			})
		}
		return err
	})
}

func decodeCount(attributes []byte, to *Count) error {
	return each(attributes, func(typ uint16, value []byte) (err error) {
		switch typ {
		case counterPackets:
			to.Packets, err = number64(value)
		case counterBytes:
			to.Bytes, err = number64(value)
		}
		return err
	})
}

// ends are the protocol of a tuple and its ports; the identifier of an ICMP echo is taken for the destination's.
type ends struct {
	protocol            uint8
	source, destination uint16
}

// port is the port of the source; the identifier of an ICMP echo.
func (e ends) port() uint16 {
	if e.protocol == unix.IPPROTO_ICMP || e.protocol == unix.IPPROTO_ICMPV6 {
		return e.destination
	}
	return e.source
}

func decodeTuple(attributes []byte, from, to *netip.Addr) (is ends, err error) {
	err = each(attributes, func(typ uint16, value []byte) error {
		switch typ {
		case tupleProtocol:
			return each(value, func(typ uint16, value []byte) (err error) {
				switch typ {
				case number:
					if len(value) != 1 {
						return errShort
					}
					is.protocol = value[0]
				case sourcePort:
					is.source, err = number16(value)
				case destinationPort, icmpID, icmpv6ID:
					is.destination, err = number16(value)
				}
				return err
			})
		case tupleIP:
			return each(value, func(typ uint16, value []byte) error {
				ip, _ := netip.AddrFromSlice(value)
				switch typ {
				case source.ipv4, source.ipv6:
					*from = ip
				case destination.ipv4, destination.ipv6:
					*to = ip
				}
				return nil
			})
		}
		return nil
	})
	return is, err
}

var errShort = errors.New("decoding netlink attributes: one has not the length of its kind")

func number16(b []byte) (uint16, error) {
	if len(b) != 2 {
		return 0, errShort
	}
	return binary.BigEndian.Uint16(b), nil
}

func number32(b []byte) (uint32, error) {
	if len(b) != 4 {
		return 0, errShort
	}
	return binary.BigEndian.Uint32(b), nil
}

func number64(b []byte) (uint64, error) {
	if len(b) != 8 {
		return 0, errShort
	}
	return binary.BigEndian.Uint64(b), nil
}

// each calls f for every attribute (struct nlattr of linux/netlink.h). It allocates nothing: there are tens of
// thousands of events a second.
func each(attributes []byte, f func(typ uint16, value []byte) error) error {
	for len(attributes) > 0 {
		if len(attributes) < unix.NLA_HDRLEN {
			return errors.New("decoding netlink attributes: the last one is cut off")
		}
		n := int(binary.NativeEndian.Uint16(attributes))
		typ := binary.NativeEndian.Uint16(attributes[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		if n < unix.NLA_HDRLEN || n > len(attributes) {
			return fmt.Errorf("decoding netlink attributes: one of %d bytes, of which %d are there", n, len(attributes))
		}
		if err := f(typ, attributes[unix.NLA_HDRLEN:n]); err != nil {
			return err
		}
		attributes = attributes[min((n+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(attributes)):]
	}
	return nil
}
