package nft

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// dumpSet returns the elements of a set in the order of the kernel.
func (t *Tables) dumpSet(want table, name string) ([]element, error) {
	msgs, err := t.read.dump(unix.NFT_MSG_GETSETELEM, want,
		attrName(unix.NFTA_SET_ELEM_LIST_TABLE, want.name), attrName(unix.NFTA_SET_ELEM_LIST_SET, name))
	if err != nil {
		return nil, err
	}
	var list []element
	for _, m := range msgs {
		err := each(m[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, b []byte) error {
			e, err := decodeElement(b)
			list = append(list, e)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}

func decodeElement(b []byte) (e element, err error) {
	value := func(to *string) func(uint16, []byte) error {
		return func(n uint16, b []byte) error {
			if n == unix.NFTA_DATA_VALUE {
				*to = string(b)
			}
			return nil
		}
	}
	err = each(b, func(n uint16, b []byte) error {
		switch n {
		case unix.NFTA_SET_ELEM_KEY:
			return each(b, value(&e.key))
		case unix.NFTA_SET_ELEM_DATA:
			return each(b, value(&e.value))
		case unix.NFTA_SET_ELEM_OBJREF:
			e.object = attrs{n: b}.string(n)
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = attrs{n: b}.uint32(n)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_EXPR:
			return each(b, func(n uint16, b []byte) error {
				if n != unix.NFTA_EXPR_DATA {
					return nil
				}
				return each(b, func(n uint16, b []byte) error {
					switch n {
					case unix.NFTA_COUNTER_PACKETS:
						e.packets = attrs{n: b}.uint64(n)
					case unix.NFTA_COUNTER_BYTES:
						e.bytes = attrs{n: b}.uint64(n)
					}
					return nil
				})
			})
		case unix.NFTA_SET_ELEM_EXPIRATION:
			e.left = time.Duration(attrs{n: b}.uint64(n)) * time.Millisecond
		}
		return nil
	})
	return e, err
}

// decode returns the elements of the set from the list that the kernel gave. Two elements of an interval set are one
// range.
//
// The value of a map of limits is the limit itself, from the object that is meant for the key.
func (s set) decode(list []element, limits map[string]string) (elements, error) {
	out := elements{}
	for _, e := range list {
		if len(e.key) != int(s.key.Bytes) || s.flags&flagMap != 0 && len(e.value) != int(s.value.Bytes) {
			return nil, fmt.Errorf("element with a key of %d and a value of %d bytes", len(e.key), len(e.value))
		}
	}
	if s.flags&flagInterval != 0 {
		return ranges(list), nil
	}
	for _, e := range list {
		if s.flags&flagObject != 0 {
			k := s.key.wire(e.key)
			out[k] = ""
			if e.object == limitName(k) {
				out[k] = limits[e.object]
			}
			continue
		}
		// wire turns either way.
		out[s.key.wire(e.key)] = s.value.wire(e.value)
	}
	return out, nil
}

// ranges joins the elements that begin ranges with those that end them. An end is the first address after the range; a
// range without end goes to the last address there is, and an end without begin is of no meaning (nft writes one, at
// the first address).
func ranges(list []element) elements {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b element) int {
		ends := map[bool]int{true: 0, false: 1} // a range may begin where another one has just ended
		return cmp.Or(cmp.Compare(a.key, b.key), ends[a.end]-ends[b.end])
	})
	out := elements{}
	var first string
	for _, e := range list {
		switch {
		case !e.end:
			first = e.key
		case first != "":
			end, _ := netip.AddrFromSlice([]byte(e.key))
			out[first], first = key(end.Prev()), ""
		}
	}
	if first != "" {
		a, _ := netip.AddrFromSlice([]byte(first))
		out[first] = key(lastAddr(netip.PrefixFrom(a, 0)))
	}
	return out
}
