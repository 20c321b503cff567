package routing

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

const (
	// looseFilter is rp_filter's loose mode: replies come over the overlay while the route to their source may be
	// another. Strict mode set for "all" is overruled by it, since the larger number counts
	// (Documentation/networking/ip-sysctl.rst).
	looseFilter = 2
	// genNone keeps the kernel from making a link-local address of its own (IN6_ADDR_GEN_MODE_NONE,
	// uapi/linux/if_link.h).
	genNone = 1
	// devconfForwarding and devconfRPFilter are IPV4_DEVCONF_FORWARDING and IPV4_DEVCONF_RP_FILTER of uapi/linux/ip.h.
	devconfForwarding, devconfRPFilter = 1, 8
	// devconfAcceptLocal is IPV4_DEVCONF_ACCEPT_LOCAL: what a pod's node has translated comes with an address of its
	// gateway as the source.
	devconfAcceptLocal = 23
	// devconfDisableIPv6 is DEVCONF_DISABLE_IPV6 of uapi/linux/ipv6.h, in the attribute IFLA_INET6_CONF of
	// uapi/linux/if_link.h: that array begins with number 0.
	devconfDisableIPv6, iflaInet6Conf = 26, 2
	// iflaInetConf is IFLA_INET_CONF of uapi/linux/if_link.h: in requests one attribute for each number of the enum
	// IPV4_DEVCONF_*, in answers all of them as one array that begins with number 1.
	iflaInetConf = 1
)

// link is what the kernel says of one of our links. The zero link: there is none.
type link struct {
	index    int
	made     string // what cannot be changed, in the words of ip(8)
	mtu      int
	mac      string
	up       bool
	rpFilter int
	// acceptLocal is accept_local, -1 where the link has no IPv4.
	acceptLocal int
	genMode     map[int]int // by family: only IPv6 has it
}

func (l link) exists() bool { return l.index != 0 }

// formerLink is what a former version made beside the overlay link: one end of a pair.
const formerLink = "egret.vo"

// madeAs returns the words with which the overlay link is made.
func madeAs(local netip.Addr) string {
	return fmt.Sprintf("type vxlan id %d dstport %d local %s nolearning gbp", egress.OverlayVNI, egress.OverlayPort, local)
}

// describe returns the words with which a link that is there was made, in the form of madeAs as far as that goes.
func describe(l netlink.Link) string {
	v, ok := l.(*netlink.Vxlan)
	if !ok {
		return "type " + l.Type()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "type vxlan id %d dstport %d local %s", v.VxlanId, v.Port, addrOf(v.SrcAddr))
	for _, flag := range []struct {
		word string
		set  bool
	}{
		{"nolearning", !v.Learning}, {"gbp", v.GBP}, {"external", v.FlowBased}, {"proxy", v.Proxy}, {"rsc", v.RSC}, {"l2miss", v.L2miss},
		{"l3miss", v.L3miss}, {"group", v.Group != nil}, {"dev", v.VtepDevIndex != 0},
		{"master", v.MasterIndex != 0}, {"noarp", v.RawFlags&unix.IFF_NOARP != 0},
	} {
		if flag.set {
			b.WriteString(" " + flag.word)
		}
	}
	return b.String()
}

// changeLinks returns what makes our link, and then what makes it as want has it. gone are the links that are not
// there, or are removed in the course.
func (o Observed) changeLinks(want Overlay) (made, ops []op, gone map[string]bool) {
	gone = map[string]bool{}
	gone[formerLink] = true
	if !want.Local.IsValid() {
		gone[egress.OverlayLink] = true
		return nil, nil, gone
	}
	now := o.links[egress.OverlayLink]
	if now.made != madeAs(want.Local) {
		if now.exists() {
			made = append(made, removeLink(egress.OverlayLink))
		}
		made, gone[egress.OverlayLink] = append(made, addOverlay(want)), true
		now = link{mtu: want.MTU, mac: egress.OverlayMAC(want.Local).String()}
	}
	return made, now.change(want, o.off), gone
}

// change returns what makes the link as o wants it.
func (l link) change(o Overlay, off map[int]bool) (ops []op) {
	const name = egress.OverlayLink
	set := func(words string, run func(*writer, netlink.Link) error) {
		ops = append(ops, op{"ip link set " + name + " " + words, func(w *writer) error {
			dev, err := w.link(name)
			if err != nil {
				return err
			}
			return run(w, dev)
		}, 0})
	}
	if mac := egress.OverlayMAC(o.Local); l.mac != mac.String() {
		set("address "+mac.String(), func(w *writer, dev netlink.Link) error { return w.handle.LinkSetHardwareAddr(dev, mac) })
	}
	if l.mtu != o.MTU && o.MTU != 0 {
		set(fmt.Sprintf("mtu %d", o.MTU), func(w *writer, dev netlink.Link) error { return w.handle.LinkSetMTU(dev, o.MTU) })
	}
	if l.rpFilter != looseFilter {
		ops = append(ops, loosen(name))
	}
	if l.acceptLocal != 1 {
		ops = append(ops, acceptLocal(name))
	}
	// Before up: that is when the kernel would make an address.
	if l.genMode[unix.AF_INET6] != genNone && !off[unix.AF_INET6] {
		set("addrgenmode none", func(w *writer, dev netlink.Link) error { return w.handle.LinkSetIP6AddrGenMode(dev, genNone) })
	}
	if !l.up {
		set("up", func(w *writer, dev netlink.Link) error { return w.handle.LinkSetUp(dev) })
	}
	return ops
}

// attributes returns those that our link is made with, and the words for them.
func (o Overlay) attributes() (netlink.LinkAttrs, string) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = egress.OverlayLink, o.MTU, egress.OverlayMAC(o.Local)
	mtu := ""
	if o.MTU != 0 {
		mtu = fmt.Sprintf(" mtu %d", o.MTU)
	}
	return attrs, fmt.Sprintf("%s%s address %s", attrs.Name, mtu, attrs.HardwareAddr)
}

func addOverlay(o Overlay) op {
	attrs, words := o.attributes()
	return op{"ip link add " + words + " " + madeAs(o.Local), func(w *writer) error {
		w.forget()
		err := w.handle.LinkAdd(&netlink.Vxlan{
			LinkAttrs: attrs, VxlanId: egress.OverlayVNI, Port: egress.OverlayPort, SrcAddr: o.Local.AsSlice(), GBP: true,
		})
		if errors.Is(err, unix.EEXIST) {
			if _, err := w.link(egress.OverlayLink); errors.Is(err, errNoLink) {
				return fmt.Errorf("another link has VNI %d on UDP port %d: remove it", egress.OverlayVNI, egress.OverlayPort)
			}
		}
		return present(err)
	}, 0}
}

func removeLink(name string) op {
	return op{"ip link del " + name, func(w *writer) error {
		w.forget()
		dev, err := w.link(name)
		if err != nil {
			return absent(err)
		}
		w.forget()
		return absent(w.handle.LinkDel(dev))
	}, 0}
}

// loosen sets rp_filter of a link, acceptLocal its accept_local.
func loosen(name string) op      { return setting(name, "rp_filter", devconfRPFilter, looseFilter) }
func acceptLocal(name string) op { return setting(name, "accept_local", devconfAcceptLocal, 1) }

// setting sets one of a link's sysctls of IPv4, which netlink knows by a number.
func setting(name, key string, devconf int, value uint32) op {
	return op{fmt.Sprintf("sysctl -w net/ipv4/conf/%s/%s=%d", name, key, value), func(w *writer) error {
		i, err := w.index(name)
		if err != nil {
			return err
		}
		return w.setIPv4(i, devconf, value)
	}, 0}
}

// setIPv4 does what writing a sysctl of the link would, in the namespace of the socket and where /proc is read-only,
// too.
func (w *writer) setIPv4(index, devconf int, value uint32) error {
	req := w.request(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	conf := spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(iflaInetConf, nil)
	conf.AddRtAttr(devconf, nl.Uint32Attr(value))
	req.AddData(spec)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// filters returns rp_filter of the links that package vlan makes, by name.
func (r *Router) filters() (map[string]int, error) {
	req := r.request(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	// the kernel leaves out all others, where it knows VLANs
	info.AddRtAttr(unix.IFLA_INFO_KIND, nl.NonZeroTerminated("vlan"))
	req.AddData(info)
	answers, err := whole("VLAN links", func() ([][]byte, error) { return req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK) })
	if err != nil {
		return nil, err
	}
	out := map[string]int{}
	for _, a := range answers {
		dev, err := netlink.LinkDeserialize(nil, a)
		if err != nil {
			return nil, err
		}
		if name := dev.Attrs().Name; dev.Type() == "vlan" && strings.HasPrefix(name, egress.VLANLinkPrefix) {
			l := link{rpFilter: -1, genMode: map[int]int{}}
			if err := l.readConf(a); err != nil {
				return nil, err
			}
			out[name] = l.rpFilter
		}
	}
	return out, nil
}

// link reads one of our links. No link is no error.
func (r *Router) link(name string) (link, error) {
	req := r.request(unix.RTM_GETLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	answers, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.ENODEV) {
		return link{}, nil
	}
	if err != nil {
		return link{}, err
	}
	if len(answers) != 1 {
		return link{}, fmt.Errorf("%d answers", len(answers))
	}
	dev, err := netlink.LinkDeserialize(nil, answers[0])
	if err != nil {
		return link{}, err
	}
	a := dev.Attrs()
	l := link{
		index: a.Index, made: describe(dev), mtu: a.MTU, mac: a.HardwareAddr.String(),
		up: a.RawFlags&unix.IFF_UP != 0, rpFilter: -1, acceptLocal: -1, genMode: map[int]int{},
	}
	return l, l.readConf(answers[0])
}

// defaultForwarding says whether new links forward IPv4. It follows net.ipv4.ip_forward.
const defaultForwarding = "/proc/sys/net/ipv4/conf/default/forwarding"

// readConf reads rp_filter and addr_gen_mode from the answer to RTM_GETLINK. They are absent when the link does not
// have the family. A link that does not pass what a new one would is said to be made otherwise: a new one takes its
// place.
func (l *link) readConf(answer []byte) error {
	attrs, err := nl.ParseRouteAttrAsMap(answer[unix.SizeofIfInfomsg:])
	if err != nil {
		return err
	}
	spec, err := nl.ParseRouteAttrAsMap(attrs[unix.IFLA_AF_SPEC].Value)
	if err != nil {
		return err
	}
	inet, err := nl.ParseRouteAttrAsMap(spec[unix.AF_INET].Value)
	if err != nil {
		return err
	}
	if conf := inet[iflaInetConf].Value; len(conf) >= devconfRPFilter*4 {
		l.rpFilter = int(nl.NativeEndian().Uint32(conf[(devconfRPFilter-1)*4:]))
		if len(conf) >= devconfAcceptLocal*4 {
			l.acceptLocal = int(nl.NativeEndian().Uint32(conf[(devconfAcceptLocal-1)*4:]))
		}
		if b, err := os.ReadFile(defaultForwarding); err == nil && string(b) == "1\n" && nl.NativeEndian().Uint32(conf[(devconfForwarding-1)*4:]) == 0 {
			l.made += " forwarding off"
		}
	}
	inet6, err := nl.ParseRouteAttrAsMap(spec[unix.AF_INET6].Value)
	if err != nil {
		return err
	}
	if mode := inet6[unix.IFLA_INET6_ADDR_GEN_MODE].Value; len(mode) == 1 {
		l.genMode[unix.AF_INET6] = int(mode[0])
	}
	if conf := inet6[iflaInet6Conf].Value; len(conf) > devconfDisableIPv6*4 && nl.NativeEndian().Uint32(conf[devconfDisableIPv6*4:]) != 0 {
		if _, on := familyOf(netip.IPv6Unspecified()).support(); on {
			l.made += " disable_ipv6"
		}
	}
	return nil
}
