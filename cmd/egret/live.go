package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/operator"
)

// liveFlags say which packets `egret trace` is about, and whether it follows one.
type liveFlags struct {
	live     bool
	protocol string
	port     int
}

func (f *liveFlags) add(s *pflag.FlagSet) {
	s.BoolVar(&f.live, "live", false, "follow a packet from the pod to --to through the nftables rules of its node and of the gateway; "+
		"with --port, and of ICMP, its node sends one in the pod's name, else the pod has to")
	s.StringVar(&f.protocol, "protocol", "", "protocol of what the pod sends, also as --proto: "+egress.ProtocolNames+"; with --live "+
		strings.Join(egress.Protocols, ", ")+" (default: any; with --port or --live: tcp)")
	s.IntVar(&f.port, "port", 0, "port of --to that it is for, of TCP, UDP or SCTP (default: any)")
	s.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "proto" {
			name = "protocol"
		}
		return pflag.NormalizedName(name)
	})
}

// question puts what the packets are, and whether one is to be followed, into a question of egret trace.
func (f *liveFlags) question(q *operator.Question) error {
	if f.protocol == "" && f.live {
		f.protocol = "tcp"
	}
	if f.live && !q.To.IsValid() {
		return errors.New("--live: want --to, the address that the pod sends to")
	}
	if f.live && !slices.Contains(egress.Protocols, f.protocol) {
		return fmt.Errorf("--protocol %.50q: want one of %s, which --live follows", f.protocol, strings.Join(egress.Protocols, ", "))
	}
	if f.port != 0 && !q.To.IsValid() {
		return fmt.Errorf("--port %d: want --to, the address that it is a port of", f.port)
	}
	if err := q.Of(f.protocol, f.port); err != nil {
		return fmt.Errorf("--%w", err) // it begins with the name
	}
	if f.live {
		protocol, err := egress.Protocol(q.Protocol, q.To)
		if err != nil {
			return fmt.Errorf("--protocol %w", err)
		}
		q.Live = &operator.Live{Protocol: protocol, Port: q.Port, Page: agent.LivePage}
	}
	return nil
}
