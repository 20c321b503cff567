package vlan

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	rtnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// State is what the kernel has to hold. The zero State wants egret0 without addresses; Delete removes the links.
type State struct {
	// Addresses are on egret0, each as a prefix of its full length. Order and duplicates are of no meaning.
	Addresses []netip.Addr
	// VLANs are the links of VLANs, by their ids.
	VLANs map[int]VLAN
	// Answers are the IPv6 addresses for which the kernel answers neighbor solicitations on a link that does not have
	// them, by link; those of IPv4 are left out.
	Answers map[string][]netip.Addr
	// Keep keeps the addresses and links that are not in the State: a record could not be read, and an error never
	// causes a delete.
	Keep bool
}

// VLAN is a link of a VLAN.
type VLAN struct {
	Parent string // the link that it is on
	MTU    int    // the parent's; 0 leaves it to the kernel
	MAC    string // locally administered, in the usual form
	// Addresses are on the link, each with the prefix of its subnet. Order and duplicates are of no meaning.
	Addresses []netip.Prefix
}

// Observed is what the kernel holds of ours. The zero Observed is a kernel that holds nothing.
type Observed struct {
	exists, up bool
	foreign    string // why the link is none of ours; "" when it is, or is not there
	addresses  []netip.Prefix
	altered    []netip.Prefix // those of the addresses that end, or are preferred, and should not
	vlans      map[int]observedVLAN
	answers    map[string]answered
}

// Addresses returns the addresses on our links, and those that are answered for. One may be among them twice.
func (o Observed) Addresses() []netip.Addr {
	var out []netip.Addr
	for _, p := range o.addresses {
		out = append(out, p.Addr())
	}
	for _, v := range o.vlans {
		for _, p := range v.addresses {
			if p != placeholder {
				out = append(out, p.Addr())
			}
		}
	}
	for _, a := range o.answers {
		out = append(out, a.ips...)
	}
	return out
}

// Config is what Links work with.
type Config struct {
	Log *slog.Logger // nil: silent
	// Sysctl is where the settings of /proc/sys/net are written; empty: there. In a container that is read-only, unless
	// it is privileged, while a bind mount of the node's is not. Whoever opens a file there sees the settings of his
	// own network namespace, not of the one that mounted it.
	Sysctl string
}

// Links reads and writes the kernel. Its methods may be called from any goroutine.
type Links struct {
	log    *slog.Logger
	sysctl string
	handle *netlink.Handle
	rt     *rtnetlink.Conn // for what the library has no words for
}

// New returns the Links of the network namespace of the calling thread. It writes nothing. Where Config.Sysctl is not
// there it is an error: settings that cannot be read would be taken for settings that nobody changed.
func New(cfg Config) (*Links, error) {
	sysctl := cmp.Or(cfg.Sysctl, "/proc/sys/net")
	if _, err := os.Stat(sysctl); err != nil {
		return nil, fmt.Errorf("looking for the settings of the network (--sysctl-dir): %w", err)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	rt, err := rtnetlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Links{log: cfg.Log, sysctl: sysctl, handle: h, rt: rt}, nil
}

// Close closes the sockets. The kernel keeps what it has.
func (l *Links) Close() {
	l.handle.Close()
	l.rt.Close() // of a socket that only asks, no error tells anything
}

// dumps is how often a dump that the kernel interrupted, because what it lists changed, is begun anew.
const dumps = 20

// whole returns what list returns once it was not interrupted.
func whole[T any](what string, list func() (T, error)) (T, error) {
	for n := 1; ; n++ {
		all, err := list()
		if err == nil {
			return all, nil
		}
		if n == dumps || !errors.Is(err, netlink.ErrDumpInterrupted) {
			var none T
			return none, fmt.Errorf("listing %s: %w", what, err)
		}
	}
}

// Observe reads what the kernel holds of ours. An error means that nothing is known.
func (l *Links) Observe() (Observed, error) {
	addresses, altered, joined, err := l.addresses()
	if err != nil {
		return Observed{}, err
	}
	answers, err := l.answers(joined)
	if err != nil {
		return Observed{}, err
	}
	vlans, err := l.vlans(addresses, altered)
	if err != nil {
		return Observed{}, err
	}
	dev, err := l.link()
	if err != nil || dev == nil {
		return Observed{vlans: vlans, answers: answers}, err
	}
	o := Observed{exists: true, up: dev.Attrs().RawFlags&unix.IFF_UP != 0, vlans: vlans, answers: answers}
	if o.foreign, err = l.foreign(dev); err != nil || o.foreign != "" {
		return o, err
	}
	o.addresses, o.altered = addresses[dev.Attrs().Index], altered[dev.Attrs().Index]
	return o, nil
}

// addresses returns the addresses on all links, by the index of the link, those of them that are not as ours are made,
// and the groups of solicited nodes that are joined.
func (l *Links) addresses() (all, altered, joined map[int][]netip.Prefix, err error) {
	addrs, err := whole("addresses", func() ([]netlink.Addr, error) { return l.handle.AddrList(nil, netlink.FAMILY_ALL) })
	all, altered, joined = map[int][]netip.Prefix{}, map[int][]netip.Prefix{}, map[int][]netip.Prefix{}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		bits, _ := a.Mask.Size()
		p := netip.PrefixFrom(ip.Unmap(), bits)
		if p.Addr().IsMulticast() {
			if a.Flags&autojoin != 0 && solicitedNodes.Contains(p.Addr()) { // which nobody else makes
				joined[a.LinkIndex] = append(joined[a.LinkIndex], p)
			}
			continue
		}
		all[a.LinkIndex] = append(all[a.LinkIndex], p)
		if uint32(a.ValidLft) != forever || p.Addr().Is6() && a.PreferedLft != 0 {
			altered[a.LinkIndex] = append(altered[a.LinkIndex], p)
		}
	}
	return all, altered, joined, err
}

// link returns egret0, or nil when it is not there.
func (l *Links) link() (netlink.Link, error) {
	dev, err := l.handle.LinkByName(egress.AddressLink)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading link %s: %w", egress.AddressLink, err)
	}
	return dev, nil
}

// foreign says why a link of the name is none of ours; "" when it is.
func (l *Links) foreign(dev netlink.Link) (string, error) {
	switch dev.Type() {
	case "dummy":
		return "", nil
	case "bridge":
	default:
		return "a link of type " + dev.Type(), nil
	}
	all, err := whole("links", l.handle.LinkList)
	if err != nil {
		return "", err
	}
	for _, port := range all {
		if port.Attrs().MasterIndex == dev.Attrs().Index {
			return "a bridge with the port " + port.Attrs().Name, nil
		}
	}
	return "", nil
}

// Changes are the difference between the kernel and a State. The zero Changes are empty.
type Changes struct {
	links, adds, removes []op
}

// op is one write, and the command of ip(8) for it.
type op struct {
	line string
	run  func(*Links) error
	vlan int // the VLAN that it is about; 0: it is about more
}

// Empty reports whether there is nothing to write.
func (c Changes) Empty() bool { return len(c.links)+len(c.adds)+len(c.removes) == 0 }

// Links returns the part that makes and sets links of VLANs, which routes need.
func (c Changes) Links() Changes { return Changes{links: c.links} }

// Adds returns the part that brings what is missing besides.
func (c Changes) Adds() Changes { return Changes{adds: c.adds} }

// Removes returns the part that takes away what is not wanted any more.
func (c Changes) Removes() Changes { return Changes{removes: c.removes} }

// String returns the changes in the order in which Apply makes them, as lines that a shell could run; "" when there are
// none.
func (c Changes) String() string {
	var b strings.Builder
	for _, o := range slices.Concat(c.links, c.adds, c.removes) {
		b.WriteString(o.line)
		b.WriteByte('\n')
	}
	return b.String()
}

// errForeign says that a link of our name is not ours.
var errForeign = errors.New("not ours: remove or rename it")

// Diff returns what makes a kernel that was observed as have equal to want. It does no I/O; equal arguments give equal
// Changes. Where a link of ours is another program's, the Changes have one op for it, and applying it is an error that
// says so.
func Diff(have Observed, want State) Changes {
	var c Changes
	c.diffVLANs(have.vlans, want)
	c.diffAnswers(have.answers, want.Answers, want.Keep)
	add := func(line string, run func(*Links) error) { c.adds = append(c.adds, op{line: line, run: run}) }
	switch {
	case have.foreign != "":
		add("ip link add "+egress.AddressLink+" type dummy", func(*Links) error {
			return fmt.Errorf("%s is %s, %w", egress.AddressLink, have.foreign, errForeign)
		})
		return c
	case !have.exists:
		add("ip link add "+egress.AddressLink+" type dummy", (*Links).make)
	case have.up:
		add("ip link set "+egress.AddressLink+" down", (*Links).setDown)
	}
	var wanted []netip.Prefix
	for _, ip := range want.Addresses {
		wanted = append(wanted, netip.PrefixFrom(ip, ip.BitLen()))
	}
	for _, p := range sorted(wanted) {
		// The kernel forgets IPv6 addresses when their link goes down: they may be there now, and not after the line
		// above.
		if lost := have.up && p.Addr().Is6(); lost || !slices.Contains(have.addresses, p) {
			add("ip addr add "+words(p, egress.AddressLink), func(l *Links) error { return present(l.address(egress.AddressLink, p, l.handle.AddrAdd)) })
		} else if slices.Contains(have.altered, p) {
			add("ip addr change "+words(p, egress.AddressLink), func(l *Links) error { return l.address(egress.AddressLink, p, l.handle.AddrReplace) })
		}
	}
	for _, p := range sorted(have.addresses) {
		if !slices.Contains(wanted, p) && !want.Keep {
			c.removes = append(c.removes, op{fmt.Sprintf("ip addr del %s dev %s", p, egress.AddressLink),
				func(l *Links) error { return absent(l.address(egress.AddressLink, p, l.handle.AddrDel)) }, 0})
		}
	}
	return c
}

// words are what ip(8) wants to know of an address.
func words(p netip.Prefix, link string) string {
	w := fmt.Sprintf("%s dev %s", p, link)
	if p.Addr().Is6() {
		w += " nodad preferred_lft 0"
	}
	if !p.IsSingleIP() {
		w += " noprefixroute"
	}
	return w
}

func sorted(ps []netip.Prefix) []netip.Prefix {
	ps = slices.SortedFunc(slices.Values(ps), netip.Prefix.Compare)
	return slices.Compact(ps)
}

// Apply makes changes. It goes on after an error and returns all of them, joined; those about one VLAN are
// egress.ExitErrors. Making the same changes again is no error.
func (l *Links) Apply(c Changes) error {
	var errs []error
	for _, o := range slices.Concat(c.links, c.adds, c.removes) {
		if err := o.run(l); err != nil {
			err = fmt.Errorf("applying %q: %w", o.line, err)
			if o.vlan != 0 {
				err = egress.ExitError{VLAN: o.vlan, Err: err}
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Delete removes our links with all their addresses. Nothing there is no error, a link of another program is.
func (l *Links) Delete() error {
	have, err := l.Observe()
	if err != nil {
		return err
	}
	var c Changes
	c.diffAnswers(have.answers, nil, false)
	c.diffVLANs(have.vlans, State{})
	if err := l.Apply(c); err != nil || !have.exists {
		return err
	}
	if have.foreign != "" {
		return fmt.Errorf("deleting %s: it is %s, %w", egress.AddressLink, have.foreign, errForeign)
	}
	dev, err := l.link()
	if err == nil && dev != nil {
		err = absent(l.handle.LinkDel(dev))
	}
	if err != nil {
		return fmt.Errorf("deleting %s: %w", egress.AddressLink, err)
	}
	return nil
}

// make makes egret0. New links are down.
func (l *Links) make() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = egress.AddressLink
	err := l.handle.LinkAdd(&netlink.Dummy{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) {
		l.log.Debug("kernel without dummy links (CONFIG_DUMMY), taking a bridge", "iface", attrs.Name)
		err = l.handle.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	}
	return present(err)
}

func (l *Links) setDown() error {
	dev, err := l.link()
	if err != nil || dev == nil {
		return err
	}
	return l.handle.LinkSetDown(dev)
}

// errNoLink says that a link is not there.
var errNoLink = errors.New("no link")

func (l *Links) address(link string, p netip.Prefix, do func(netlink.Link, *netlink.Addr) error) error {
	dev, err := l.handle.LinkByName(link)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return fmt.Errorf("%w %s", errNoLink, link)
	}
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		// Duplicate address detection cannot run on a link that is down, and who holds the address is etcd's to say. No
		// preferred lifetime: for IPv6, the kernel takes the source of the node's own packets from the addresses of all
		// links (RFC 6724).
		a.Flags, a.ValidLft, a.PreferedLft = unix.IFA_F_NODAD, int(forever), 0
	}
	if !p.IsSingleIP() { // the way to the subnet is in its own table: the main one may have another
		a.Flags |= unix.IFA_F_NOPREFIXROUTE
	}
	if p == placeholder {
		a.Scope = int(netlink.SCOPE_LINK)
	}
	return do(dev, a)
}

// forever is INFINITY_LIFE_TIME of the kernel's include/net/addrconf.h. Where an int cannot hold it, the library leaves
// both lifetimes out, and the address is preferred.
var forever uint32 = 0xffffffff

// present drops the error of adding what is there.
func present(err error) error {
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// absent drops the errors of removing what is not there.
func absent(err error) error {
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV) || errors.Is(err, errNoLink) {
		return nil
	}
	return err
}
