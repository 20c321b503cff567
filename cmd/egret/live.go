package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/operator"
)

// liveFlags say which packets `egret trace --live` follows.
type liveFlags struct {
	live     bool
	protocol string
	port     int
}

func (f *liveFlags) add(s *pflag.FlagSet) {
	s.BoolVar(&f.live, "live", false, "follow a packet that the pod sends to --to through the nftables rules of its node and of the gateway")
	s.StringVar(&f.protocol, "protocol", "tcp", "with --live: "+strings.Join(egress.Protocols, ", "))
	s.IntVar(&f.port, "port", 0, "with --live: the port of --to that it is for, of TCP or UDP (default: any)")
}

// question puts what is to be followed into a question of egret trace.
func (f *liveFlags) question(q *operator.Question) error {
	if !f.live {
		if f.port != 0 || f.protocol != "tcp" {
			return errors.New("--port and --protocol say what --live follows: want it, too")
		}
		return nil
	}
	if !q.To.IsValid() {
		return errors.New("--live: want --to, the address that the pod sends to")
	}
	protocol, err := egress.Protocol(f.protocol, q.To)
	if err != nil {
		return fmt.Errorf("--protocol %w", err)
	}
	if f.port < 0 || f.port > 65535 || f.port != 0 && f.protocol == "icmp" {
		return fmt.Errorf("--port %d: want one of TCP or UDP, 1 to 65535", f.port)
	}
	q.Live = &operator.Live{Protocol: protocol, Port: uint16(f.port), Page: agent.LivePage}
	return nil
}
