package agent

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
)

const (
	// faultAge is how long a node has to be at fault before it says so: most faults are others' changes in the middle
	// of a round, and are mended by the next one.
	faultAge = time.Second
	// maxFault bounds the text of one part's fault, in bytes: it goes into etcd, and from there into the status of
	// every egress concerned.
	maxFault = 200
)

// fault is an error about one part of what a node has to program.
type fault struct {
	part string
	error
}

func (f fault) Unwrap() error { return f.error }

// in says which part an error is about; nil stays nil.
func in(part string, err error) error {
	if err == nil {
		return nil
	}
	return fault{part, err}
}

// faults returns what an error says of the parts, by part.
func faults(err error) map[string]string {
	out := map[string]string{}
	var walk func(error)
	walk = func(err error) {
		var f fault
		if many, ok := err.(interface{ Unwrap() []error }); ok {
			for _, err := range many.Unwrap() {
				walk(err)
			}
		} else if errors.As(err, &f) && out[f.part] == "" {
			text := strings.ReplaceAll(f.error.Error(), "\n", "; ")
			out[f.part] = strings.ToValidUTF8(text[:min(len(text), maxFault)], "")
		}
	}
	walk(err)
	return out
}

// hampers reports whether an error, of programming d, is about an egress IP: it is, unless it is all about ways out of
// the node by which that IP does not leave.
func hampers(err error, d plan.Desired, ip netip.Addr) bool {
	var exit routing.Subnet // the zero Subnet: by the main table
	for _, h := range d.NFT.Hosted {
		if i := slices.IndexFunc(d.Routing.Subnets, func(s routing.Subnet) bool { return s.Mark == h.Mark }); h.IP == ip && i >= 0 {
			exit = d.Routing.Subnets[i]
		}
	}
	var about func(error) bool
	about = func(err error) bool {
		switch e := err.(type) {
		case nil:
			return false
		case interface{ Unwrap() []error }:
			return slices.ContainsFunc(e.Unwrap(), about)
		case egress.ExitError:
			return e.Mark != 0 && e.Mark == exit.Mark || e.VLAN != 0 && egress.VLANLink(e.VLAN) == exit.Link
		}
		cause := errors.Unwrap(err)
		return cause == nil || about(cause)
	}
	return about(err)
}
