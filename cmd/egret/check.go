package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

func checkCommand() *cobra.Command {
	var nodeIP, output string
	var etcd etcdFlags
	c := &cobra.Command{
		Use:   "check",
		Short: "Print what the agent needs of this node and of etcd, and what of it is there",
		Long: "Runs on a node, in its network namespace, as root. It changes nothing. etcd is asked where --endpoints says where it is. The exit\n" +
			"status is 1 when something is missing that the agent cannot work without.",
		Args: cobra.NoArgs,
	}
	c.Flags().StringVar(&nodeIP, "node-ip", "", "address of this node that the overlay uses (default: look at the default route's link)")
	c.Flags().StringVarP(&output, "output", "o", "", "json or yaml (default: a table)")
	etcd.add(c.Flags())
	c.RunE = configured(nil, func(c *cobra.Command, _ []string) error {
		if err := operator.CheckFormat(output); err != nil {
			return err
		}
		var ip netip.Addr
		if nodeIP != "" {
			var err error
			if ip, err = netip.ParseAddr(nodeIP); err != nil {
				return fmt.Errorf("--node-ip %q: want an IPv4 or IPv6 address", nodeIP)
			}
		}
		if os.Geteuid() != 0 {
			return errors.New("the check tries what the kernel can do: run it as root")
		}
		var client *store.Client
		var err error
		asked := c.Flags().Changed("endpoints") // by the environment too
		if asked {
			if client, err = etcd.dial(c.Context(), slog.New(slog.DiscardHandler)); err == nil {
				defer client.Close()
			}
		}
		var more []check.Finding
		for _, look := range []func(context.Context, *store.Client, error) check.Finding{operator.CheckEtcd, operator.CheckAgents, operator.CheckPods} {
			more = append(more, look(c.Context(), client, err))
		}
		more = append(more, etcd.check(c.Context(), asked))
		return operator.CheckNode(ip.Unmap(), more, output, c.OutOrStdout())
	})
	return c
}
