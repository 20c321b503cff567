package announce

import (
	"bytes"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
)

// linkByName returns a link as it is now. net.InterfaceByName reads all links for that, hundreds on a node with as many
// pods.
func linkByName(name string) (*net.Interface, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("finding link %s: %w", name, err)
	}
	is := l.Attrs()
	out := &net.Interface{Index: is.Index, MTU: is.MTU, Name: is.Name, Flags: is.Flags}
	if mac := is.HardwareAddr; !bytes.Equal(mac, make([]byte, len(mac))) { // as lo's
		out.HardwareAddr = mac
	}
	return out, nil
}

// macOf returns the MAC address of a link; "": there is none, or no link.
func macOf(link string) string {
	l, err := linkByName(link)
	if err != nil {
		return ""
	}
	return l.HardwareAddr.String()
}

// eachLinkOnce is linkByName, for who asks for the same links again and again in one go.
func eachLinkOnce() func(name string) (*net.Interface, error) {
	type answer struct {
		link *net.Interface
		err  error
	}
	known := map[string]answer{}
	return func(name string) (*net.Interface, error) {
		a, asked := known[name]
		if !asked {
			a.link, a.err = linkByName(name)
			known[name] = a
		}
		return a.link, a.err
	}
}
