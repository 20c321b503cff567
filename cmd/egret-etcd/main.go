// Command egret-etcd is the etcd that Egret runs for clusters that have none to give: a member, its snapshots, and the
// way back from one. It is a program of its own, in the same image, because an agent would pay for it on every node: 12
// MB of memory for what is linked in and not used.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker; see the Makefile.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := root().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "egret-etcd:", err)
		os.Exit(1)
	}
}

func root() *cobra.Command {
	c := &cobra.Command{
		Use: "egret-etcd", Short: "The etcd of an installation of Egret", Version: version, SilenceUsage: true, SilenceErrors: true,
	}
	c.AddCommand(runCommand(), snapshotCommand())
	return c
}
