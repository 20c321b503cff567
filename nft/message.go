package nft

import (
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// op is one part of a transaction: in the words of nft(8), and as messages of nf_tables.
type op struct {
	line string
	msgs []netlink.Message
	err  error // of encoding; commit returns it
}

// newOp makes an op of one message about the table. The attributes of nf_tables are big-endian.
func (t table) newOp(line string, typ int, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) op {
	m, err := request(typ, t.family, flags, fill)
	return op{line: line, msgs: []netlink.Message{m}, err: err}
}

// request builds a message for nf_tables: struct nfgenmsg (family, version 0, resource 0), then attributes.
func request(typ int, f nftables.TableFamily, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) (netlink.Message, error) {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	fill(e)
	b, err := e.Encode()
	if err != nil {
		return netlink.Message{}, fmt.Errorf("encoding netlink attributes: %w", err)
	}
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ), Flags: netlink.Request | flags},
		Data:   append([]byte{byte(f), 0, 0, 0}, b...),
	}, nil
}

// always wraps an encoding that cannot fail by itself, for AttributeEncoder.Nested.
func always(fill func(*netlink.AttributeEncoder)) func(*netlink.AttributeEncoder) error {
	return func(e *netlink.AttributeEncoder) error { fill(e); return nil }
}

func (t table) addTable() op {
	return t.newOp("add table "+t.id()+t.definition(), unix.NFT_MSG_NEWTABLE, netlink.Create, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_TABLE_NAME, t.name)
		e.Uint32(unix.NFTA_TABLE_FLAGS, t.flags) // wakes a dormant one, and takes over one that is nobody's
	})
}

func (t table) deleteTable() op {
	return t.newOp("delete table "+t.id(), unix.NFT_MSG_DELTABLE, 0, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_TABLE_NAME, t.name)
	})
}

// flush removes all rules of all chains.
func (t table) flush() op {
	return t.newOp("flush table "+t.id(), unix.NFT_MSG_DELRULE, 0, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_RULE_TABLE, t.name)
	})
}

func (t table) addChain(c chain) op {
	line := fmt.Sprintf("add chain %s %s%s", t.id(), c.name, c.hook.definition())
	return t.newOp(line, unix.NFT_MSG_NEWCHAIN, netlink.Create, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_CHAIN_TABLE, t.name)
		e.String(unix.NFTA_CHAIN_NAME, c.name)
		if c.hook == (hook{}) {
			return
		}
		e.Nested(unix.NFTA_CHAIN_HOOK, always(func(e *netlink.AttributeEncoder) {
			e.Uint32(unix.NFTA_HOOK_HOOKNUM, uint32(c.hook.num))
			e.Uint32(unix.NFTA_HOOK_PRIORITY, uint32(c.hook.prio))
			if c.hook.device != "" {
				e.String(unix.NFTA_HOOK_DEV, c.hook.device)
			}
		}))
		e.Uint32(unix.NFTA_CHAIN_POLICY, uint32(nftables.ChainPolicyAccept))
		e.String(unix.NFTA_CHAIN_TYPE, string(c.hook.kind))
	})
}

func (t table) deleteChain(name string) op {
	return t.newOp(fmt.Sprintf("delete chain %s %s", t.id(), name), unix.NFT_MSG_DELCHAIN, 0, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_CHAIN_TABLE, t.name)
		e.String(unix.NFTA_CHAIN_NAME, name)
	})
}

func (t table) addCounter(name string) op {
	return t.newOp(fmt.Sprintf("add counter %s %s", t.id(), name), unix.NFT_MSG_NEWOBJ, netlink.Create, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_OBJ_TABLE, t.name)
		e.String(unix.NFTA_OBJ_NAME, name)
		e.Uint32(unix.NFTA_OBJ_TYPE, uint32(objectCounter))
		e.Nested(unix.NFTA_OBJ_DATA, always(func(*netlink.AttributeEncoder) {}))
	})
}

func (t table) deleteObject(name string, kind objectKind) op {
	return t.newOp(fmt.Sprintf("delete %s %s %s", kind, t.id(), name), unix.NFT_MSG_DELOBJ, 0, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_OBJ_TABLE, t.name)
		e.String(unix.NFTA_OBJ_NAME, name)
		e.Uint32(unix.NFTA_OBJ_TYPE, uint32(kind))
	})
}

// addSet makes a set. The kernel wants an id for what it is called in the transaction; names do as well, so all have
// the same.
func (t table) addSet(s set) op {
	line := fmt.Sprintf("add %s %s %s %s", s.noun(), t.id(), s.name, s.definition())
	return t.newOp(line, unix.NFT_MSG_NEWSET, netlink.Create, func(e *netlink.AttributeEncoder) { t.encodeSet(e, s, 1) })
}

func (t table) encodeSet(e *netlink.AttributeEncoder, s set, id uint32) {
	e.String(unix.NFTA_SET_TABLE, t.name)
	e.String(unix.NFTA_SET_NAME, s.name)
	e.Uint32(unix.NFTA_SET_FLAGS, s.flags)
	e.Uint32(unix.NFTA_SET_KEY_TYPE, s.key.GetNFTMagic())
	e.Uint32(unix.NFTA_SET_KEY_LEN, s.key.Bytes)
	e.Uint32(unix.NFTA_SET_ID, id)
	if s.flags&flagObject != 0 {
		e.Uint32(unix.NFTA_SET_OBJ_TYPE, uint32(s.object))
	}
	if s.counted {
		e.Nested(attrSetExpr, always(func(e *netlink.AttributeEncoder) {
			e.String(unix.NFTA_EXPR_NAME, "counter")
			e.Nested(unix.NFTA_EXPR_DATA, always(func(*netlink.AttributeEncoder) {})) // from 0 on
		}))
	}
	if s.size > 0 {
		e.Nested(unix.NFTA_SET_DESC, always(func(e *netlink.AttributeEncoder) { e.Uint32(unix.NFTA_SET_DESC_SIZE, s.size) }))
	}
	// What nft needs to print marks, and to take them, the right way round.
	user := userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, s.key.byteOrder())
	if s.flags&flagMap != 0 {
		e.Uint32(unix.NFTA_SET_DATA_TYPE, s.value.GetNFTMagic())
		e.Uint32(unix.NFTA_SET_DATA_LEN, s.value.Bytes)
		user = userdata.AppendUint32(user, userdata.NFTNL_UDATA_SET_DATABYTEORDER, s.value.byteOrder())
		if s.value.interval {
			user = userdata.AppendUint32(user, userdata.NFTNL_UDATA_SET_DATA_INTERVAL, 1)
		}
	}
	e.Bytes(unix.NFTA_SET_USERDATA, user)
}

// byteOrder is enum byteorder of nft (include/datatype.h).
func (k kind) byteOrder() uint32 {
	if k.order == binaryutil.NativeEndian {
		return 1
	}
	return 2
}

func (t table) deleteSet(noun, name string) op {
	return t.newOp(fmt.Sprintf("delete %s %s %s", noun, t.id(), name), unix.NFT_MSG_DELSET, 0, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_SET_TABLE, t.name)
		e.String(unix.NFTA_SET_NAME, name)
	})
}

func (t table) flushSet(name string) op {
	return t.newOp(fmt.Sprintf("flush set %s %s", t.id(), name), unix.NFT_MSG_DELSETELEM, 0, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.name)
		e.String(unix.NFTA_SET_ELEM_LIST_SET, name)
	})
}

// An element is one element of a set, as the kernel has it.
type element struct {
	key, value string
	object     string        // the name of the object it refers to
	end        bool          // of an interval set: the first address after a range
	timeout    time.Duration // to be written; 0: none
	left       time.Duration // as it was read
	packets    uint64        // of its counter, as it was read
	bytes      uint64
}

func (t table) addElements(set string, names []string, list []element) op {
	return t.elementsOp("add", unix.NFT_MSG_NEWSETELEM, netlink.Create, set, names, list)
}

func (t table) deleteElements(set string, names []string, list []element) op {
	return t.elementsOp("delete", unix.NFT_MSG_DELSETELEM, 0, set, names, list)
}

func (t table) elementsOp(verb string, typ int, flags netlink.HeaderFlags, set string, names []string, list []element) op {
	line := fmt.Sprintf("%s element %s %s { %s }", verb, t.id(), set, strings.Join(names, ", "))
	return t.newOp(line, typ, flags, func(e *netlink.AttributeEncoder) { t.encodeElements(e, set, 0, list) })
}

func (t table) encodeElements(e *netlink.AttributeEncoder, set string, id uint32, list []element) {
	e.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.name)
	e.String(unix.NFTA_SET_ELEM_LIST_SET, set)
	if id != 0 {
		e.Uint32(unix.NFTA_SET_ELEM_LIST_SET_ID, id)
	}
	data := func(e *netlink.AttributeEncoder, typ uint16, s string) {
		e.Nested(typ, always(func(e *netlink.AttributeEncoder) { e.Bytes(unix.NFTA_DATA_VALUE, []byte(s)) }))
	}
	e.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, always(func(e *netlink.AttributeEncoder) {
		for _, el := range list {
			e.Nested(unix.NFTA_LIST_ELEM, always(func(e *netlink.AttributeEncoder) {
				data(e, unix.NFTA_SET_ELEM_KEY, el.key)
				if el.value != "" {
					data(e, unix.NFTA_SET_ELEM_DATA, el.value)
				}
				if el.object != "" {
					e.String(unix.NFTA_SET_ELEM_OBJREF, el.object)
				}
				if el.end {
					e.Uint32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
				}
				if el.timeout > 0 {
					e.Uint64(unix.NFTA_SET_ELEM_TIMEOUT, uint64(el.timeout.Milliseconds()))
				}
			}))
		}
	}))
}

// addRule appends a rule to its chain, after the anonymous sets that it looks into. Their ids are those from id on.
func (t table) addRule(chain string, r rule, id uint32) op {
	var msgs []netlink.Message
	for i, own := range r.sets {
		id := id + uint32(i)
		s := set{name: anonymous, key: own.kind, flags: unix.NFT_SET_ANONYMOUS | unix.NFT_SET_CONSTANT}
		made, err := request(unix.NFT_MSG_NEWSET, t.family, netlink.Create, func(e *netlink.AttributeEncoder) { t.encodeSet(e, s, id) })
		if err != nil {
			return op{err: err}
		}
		filled, err := request(unix.NFT_MSG_NEWSETELEM, t.family, netlink.Create, func(e *netlink.AttributeEncoder) {
			t.encodeElements(e, s.name, id, own.elements)
		})
		if err != nil {
			return op{err: err}
		}
		msgs = append(msgs, made, filled)
	}
	line := fmt.Sprintf("add rule %s %s %s", t.id(), chain, r.words)
	o := t.newOp(line, unix.NFT_MSG_NEWRULE, netlink.Create|unix.NLM_F_APPEND, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_RULE_TABLE, t.name)
		e.String(unix.NFTA_RULE_CHAIN, chain)
		e.Nested(unix.NFTA_RULE_EXPRESSIONS, always(func(e *netlink.AttributeEncoder) {
			for _, x := range r.expressions(id) {
				e.Do(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, func() ([]byte, error) { return marshal(byte(t.family), x) })
			}
		}))
		e.Bytes(unix.NFTA_RULE_USERDATA, append([]byte{tagType, byte(len(r.tag))}, r.tag...))
	})
	o.msgs = append(msgs, o.msgs...)
	return o
}
