package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/operator"
)

func checkCommand() *cobra.Command {
	var nodeIP, output string
	c := &cobra.Command{
		Use:   "check",
		Short: "Print what the agent needs of this node, and what of it is there",
		Long: "Runs on a node, in its network namespace, as root. It changes nothing. The exit status is 1 when something is missing that\n" +
			"the agent cannot work without.",
		Args: cobra.NoArgs,
	}
	c.Flags().StringVar(&nodeIP, "node-ip", "", "address of this node that the overlay uses (default: look at the default route's link)")
	c.Flags().StringVarP(&output, "output", "o", "", "json or yaml (default: a table)")
	c.RunE = func(c *cobra.Command, _ []string) error {
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
		return operator.CheckNode(ip.Unmap(), output, c.OutOrStdout())
	}
	return c
}
