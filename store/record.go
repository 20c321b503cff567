package store

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
)

// Encode returns a record as it is written to etcd: JSON on one line, fields in the order of the struct, no HTML
// escapes. Equal values are equal bytes.
func Encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, fmt.Errorf("encoding %T: %w", v, err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// Decode reads a record of package egress. Unknown fields are ignored. Of an Owner and a Move, Lease and Revision come
// from the key, of a Suspicion Revision. It checks the JSON alone: what a View does not accept may pass here.
func Decode[T any](r Record) (T, error) {
	var v T
	if err := json.Unmarshal(r.Value, &v); err != nil {
		var zero T
		return zero, fmt.Errorf("decoding %T: %w", v, err)
	}
	switch p := any(&v).(type) {
	case *egress.Owner:
		p.Lease, p.Revision = r.Lease, r.Revision
	case *egress.Move:
		p.Lease, p.Revision = r.Lease, r.Revision
	case *egress.Suspicion:
		p.Revision = r.Revision
	}
	return v, nil
}

// DecodeOwner reads the record of an owners/<ip> key.
func DecodeOwner(r Record) (egress.Owner, error) { return Decode[egress.Owner](r) }

// The checks below say what is wrong with a record that is JSON. They take the key's last part and the value.

func disagree(field string, value, key any) error {
	return fmt.Errorf("key and value disagree: the key says %v, %s is %v", key, field, value)
}

func same[T comparable](field string, value, key T) error {
	if value != key {
		return disagree(field, value, key)
	}
	return nil
}

func required(field, value string) error {
	if value == "" {
		return fmt.Errorf("%s is empty", field)
	}
	return nil
}

func validIP(field string, ip netip.Addr) error {
	if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" {
		return fmt.Errorf("%s %q: want an IPv4 or IPv6 address, without a zone", field, ip)
	}
	return nil
}

func validCIDRs(what string, ps []netip.Prefix) error {
	var errs []error
	for _, p := range ps {
		if !p.IsValid() {
			errs = append(errs, fmt.Errorf("%s %q: want an address and a prefix length", what, p))
		}
	}
	return errors.Join(errs...)
}

func validID(id egress.ID) error {
	if id == 0 || id > egress.MaxID {
		return fmt.Errorf("id %d: want 1 to %d", id, egress.MaxID)
	}
	return nil
}

func checkPool(name string, p egress.Pool) error {
	errs := []error{same("name", p.Name, name)}
	for _, r := range p.Ranges {
		errs = append(errs, validIP("start", r.Start), validIP("end", r.End))
		if r.Start.Is4() != r.End.Is4() || r.End.Less(r.Start) {
			errs = append(errs, fmt.Errorf("range %s: want a start that is not after the end, of the same family", r))
		}
	}
	if s := p.Subnet; s != nil {
		errs = append(errs, validIP("gateway", s.Gateway))
		if s.PrefixLength < 1 || s.PrefixLength > max(s.Gateway.BitLen(), 1) {
			errs = append(errs, fmt.Errorf("prefix length %d: want 1 to %d", s.PrefixLength, s.Gateway.BitLen()))
		}
		if s.VLAN < 0 || s.VLAN > 4094 {
			errs = append(errs, fmt.Errorf("VLAN id %d: want 0 to 4094", s.VLAN))
		}
	}
	return errors.Join(errs...)
}

func checkPolicy(name string, p egress.Policy) error {
	errs := []error{same("name", p.Name, name)}
	seen := map[bool]bool{}
	for _, a := range p.Addresses {
		errs = append(errs, validIP("ip", a.IP), validID(a.ID))
		if seen[a.IP.Is4()] {
			errs = append(errs, fmt.Errorf("ip %s is the second of its family", a.IP))
		}
		seen[a.IP.Is4()] = true
	}
	if b := p.Bandwidth; b != nil && (b.Rate < 0 || b.Burst < 0) {
		errs = append(errs, fmt.Errorf("bandwidth %d, burst %d: want no negative number", b.Rate, b.Burst))
	}
	return errors.Join(errs...)
}

func checkNode(name string, n egress.Node) error {
	errs := []error{same("name", n.Name, name)}
	if n.Index < 1 || n.Index > egress.MaxNodeIndex {
		errs = append(errs, fmt.Errorf("index %d: want 1 to %d", n.Index, egress.MaxNodeIndex))
	}
	for _, ip := range n.Addresses {
		errs = append(errs, validIP("address", ip))
	}
	return errors.Join(append(errs, validCIDRs("pod CIDR", n.PodCIDRs))...)
}

func checkService(name string, s egress.ServiceCIDR) error {
	return errors.Join(same("name", s.Name, name), validCIDRs("Service CIDR", s.CIDRs))
}

func checkPodRanges(node string, p egress.PodRanges) error {
	return errors.Join(same("node", p.Node, node), validCIDRs("address of pods", p.CIDRs))
}

func checkAgent(name string, a egress.Agent) error { return same("node", a.Node, name) }

func checkOwner(ip netip.Addr, o egress.Owner) error {
	return errors.Join(same("ip", o.IP, ip), required("node", o.Node))
}

func checkMove(ip netip.Addr, m egress.Move) error {
	return errors.Join(same("ip", m.IP, ip), required("to", m.To))
}

func checkPin(ip netip.Addr, p egress.Pin) error {
	return errors.Join(same("ip", p.IP, ip), required("node", p.Node))
}

func checkPermits(_ string, p egress.Permits) error {
	if p.Longest <= 0 {
		return errors.New("longest is missing")
	}
	return nil
}

func checkCordon(node string, c egress.Cordon) error { return same("node", c.Node, node) }

func checkSuspicion(node string, s egress.Suspicion) error { return same("node", s.Node, node) }

func checkAllocation(ip netip.Addr, a egress.Allocation) error {
	return errors.Join(same("ip", a.IP, ip), validID(a.ID))
}

// membersKey is the last part of a key of members: members/by-egress/<egress>/<node>.
type membersKey struct{ egress, node string }

func checkMembers(k membersKey, m egress.Members) error {
	errs := []error{same("egress", m.Egress, k.egress), same("node", m.Node, k.node)}
	for _, p := range m.Pods {
		for _, ip := range p.IPs {
			errs = append(errs, validIP("IP of pod "+cmp.Or(p.Pod, "-"), ip))
		}
	}
	return errors.Join(errs...)
}

// parseBlock reads the key of a block, whole: blocks/<ip>/<first>.
func parseBlock(key string) (ip netip.Addr, first uint16, err error) {
	text, port, _ := strings.Cut(strings.TrimPrefix(key, BlockPrefix), "/")
	if ip, err = parseIP(text); err != nil {
		return ip, 0, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || BlockKey(ip, uint16(n)) != key {
		return ip, 0, fmt.Errorf("key ends in %q: want a port, five digits", port)
	}
	return ip, uint16(n), nil
}

// DecodeBlock reads the record of a blocks/<ip>/<first> key. IP and First are those of the key also when there is an
// error, as far as it has them: where it has none, the IP is not valid.
func DecodeBlock(key string, r Record) (egress.Block, error) {
	ip, first, err := parseBlock(key)
	if err != nil {
		return egress.Block{}, err
	}
	b, err := Decode[egress.Block](r)
	if err == nil {
		err = errors.Join(same("ip", b.IP, ip), same("first", b.First, first), required("node", b.Node), b.Fault())
	}
	if err != nil {
		return egress.Block{IP: ip, First: first}, err
	}
	return b, nil
}

// DecodeBlockTenure reads the record of a blocks-history/<ip>/<first>/<until>-<since> key.
func DecodeBlockTenure(key string, r Record) (egress.BlockTenure, error) {
	t, err := Decode[egress.BlockTenure](r)
	if err != nil {
		return egress.BlockTenure{}, err
	}
	b := egress.Block{IP: t.IP, First: t.First, Size: t.Size}
	err = errors.Join(validIP("ip", t.IP), required("node", t.Node), b.Fault())
	if err == nil && BlockHistoryKey(t) != key {
		err = disagree("the tenure", BlockHistoryKey(t), key)
	}
	return t, err
}

// BlockHistoryEnd reads of a key of blocks-history/ whose IP it is of, and when the node lost the block.
func BlockHistoryEnd(key string) (ip netip.Addr, until time.Time, err error) {
	parts := strings.Split(strings.TrimPrefix(key, BlockHistoryPrefix), "/")
	if len(parts) != 3 {
		return ip, until, fmt.Errorf("key %q: want <ip>/<first>/<until>-<since>", key)
	}
	if ip, err = parseIP(parts[0]); err != nil {
		return ip, until, err
	}
	end, _, _ := strings.Cut(parts[2], "-")
	until, err = time.Parse(blockTime, end)
	return ip, until, err
}

// The parsers below read the last part of a key. They accept one spelling of each value, so that no two keys mean the
// same.

func parseName(s string) (string, error) {
	if s == "" || strings.Contains(s, "/") {
		return "", fmt.Errorf("key ends in %q: want a name", s)
	}
	return s, nil
}

func parseNothing(s string) (string, error) {
	if s != "" {
		return "", fmt.Errorf("key goes on with %q", s)
	}
	return s, nil
}

func parseIP(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.String() != s || ip.Is4In6() || ip.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("key ends in %q: want an IPv4 or IPv6 address in its usual form", s)
	}
	return ip, nil
}

func parseMembers(s string) (membersKey, error) {
	e, n, _ := strings.Cut(s, "/")
	if _, err := parseName(n); err != nil || e == "" {
		return membersKey{}, fmt.Errorf("key ends in %q: want <egress>/<node>", s)
	}
	return membersKey{e, n}, nil
}
