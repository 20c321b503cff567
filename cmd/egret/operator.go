package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/operator"
)

// quiet is the logger of commands that answer and end: what they have to say is their output and their error.
var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func getCommand() *cobra.Command {
	var etcd etcdFlags
	var output string
	c := &cobra.Command{
		Use:       "get " + strings.Join(operator.Kinds, "|"),
		Short:     "Print what etcd holds",
		Args:      cobra.ExactArgs(1),
		ValidArgs: operator.Kinds,
	}
	etcd.add(c.Flags())
	c.Flags().StringVarP(&output, "output", "o", "", "json or yaml (default: a table)")
	c.RunE = configured(nil, func(c *cobra.Command, args []string) error {
		if err := operator.Check(args[0], output); err != nil {
			return err
		}
		client, err := etcd.dial(c.Context(), quiet)
		if err != nil {
			return err
		}
		defer client.Close()
		return operator.Get(c.Context(), client, args[0], output, c.OutOrStdout())
	})
	return c
}

func moveCommand() *cobra.Command {
	var etcd etcdFlags
	var to string
	var patience time.Duration
	c := &cobra.Command{
		Use:   "move IP --to NODE",
		Short: "Move an egress IP to another node, without losing a packet",
		Args:  cobra.ExactArgs(1),
	}
	etcd.add(c.Flags())
	c.Flags().StringVar(&to, "to", "", "the node that shall hold the IP")
	c.Flags().DurationVar(&patience, "timeout", 15*time.Second, "how long to wait before the request is withdrawn; whole seconds, at least 2s")
	_ = c.MarkFlagRequired("to") // fails only for a flag that does not exist
	c.RunE = configured(nil, func(c *cobra.Command, args []string) error {
		ip, err := netip.ParseAddr(args[0])
		if err != nil {
			return fmt.Errorf("%q: want the egress IP to move, an IPv4 or IPv6 address", args[0])
		}
		if patience < 2*time.Second || patience%time.Second != 0 {
			return fmt.Errorf("--timeout %v: want whole seconds, at least 2s", patience)
		}
		client, err := etcd.dial(c.Context(), quiet)
		if err != nil {
			return err
		}
		defer client.Close()
		return operator.Move(c.Context(), client, ip.Unmap(), to, patience, c.OutOrStdout())
	})
	return c
}
