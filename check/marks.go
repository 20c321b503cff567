package check

import (
	"encoding/binary"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"

	"github.com/egret-project/egret/egress"
)

// marksOfOthers returns the ip rules and the nftables chains of others that read or write bits of the packet mark that are Egret's.
// Chains of the legacy iptables are not looked at.
func marksOfOthers() (out []string, err error) {
	all, err := rules()
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		mask := uint32(0xffffffff)
		if r.Mask != nil {
			mask = *r.Mask
		}
		if r.Mark != 0 && uint32(egress.MarkMask)&mask != 0 {
			out = append(out, fmt.Sprintf("rule %d fwmark 0x%x/0x%x", r.Priority, r.Mark, mask))
		}
	}
	c, err := nftables.New()
	if err != nil {
		return out, err
	}
	chains, err := c.ListChains()
	if err != nil {
		return out, fmt.Errorf("listing chains: %w", err)
	}
	for _, chain := range chains {
		if chain.Table.Name == egress.TableName {
			continue
		}
		rules, err := c.GetRules(chain.Table, chain)
		if err != nil {
			return out, fmt.Errorf("listing the rules of %s: %w", nameOf(chain), err)
		}
		for _, r := range rules {
			if marked(r.Exprs)&uint32(egress.MarkMask) != 0 {
				out = append(out, "chain "+nameOf(chain))
			}
		}
	}
	return out, nil
}

func nameOf(c *nftables.Chain) string {
	family := map[nftables.TableFamily]string{
		nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyNetdev: "netdev",
	}[c.Table.Family]
	return family + " " + c.Table.Name + " " + c.Name
}

// marked returns the bits of the packet mark that a rule writes.
func marked(exprs []expr.Any) (bits uint32) {
	written := map[uint32]uint32{} // by register: the bits of the mark that are not as they were
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Meta:
			if e.Key == expr.MetaKeyMARK && e.SourceRegister {
				bits |= written[e.Register]
			} else if !e.SourceRegister {
				written[e.Register] = 0xffffffff
				if e.Key == expr.MetaKeyMARK {
					written[e.Register] = 0
				}
			}
		case *expr.Bitwise:
			if len(e.Mask) == 4 && len(e.Xor) == 4 {
				written[e.DestRegister] = written[e.SourceRegister] | ^binary.NativeEndian.Uint32(e.Mask) | binary.NativeEndian.Uint32(e.Xor)
			}
		case *expr.Immediate:
			written[e.Register] = 0xffffffff
		case *expr.Ct:
			written[e.Register] = 0xffffffff
		case *expr.Target:
			bits |= targetMark(e)
		}
	}
	return bits
}

// targetMark returns the bits that the MARK target of iptables-nft writes: revision 2 has a mark and a mask (xt_mark_tginfo2).
func targetMark(t *expr.Target) uint32 {
	info, ok := t.Info.(*xt.Unknown)
	if t.Name != "MARK" || !ok || len(*info) < 8 {
		return 0
	}
	return binary.NativeEndian.Uint32(*info) | binary.NativeEndian.Uint32((*info)[4:])
}
