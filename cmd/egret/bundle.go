package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/bundle"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/operator"
)

func bundleCommand() *cobra.Command {
	var etcd etcdFlags
	var cfg bundle.Config
	var output, nodeIP string
	c := &cobra.Command{
		Use:   "bundle",
		Short: "Write a support archive without secrets",
		Long: "Writes a compressed tar archive of what is in etcd, how etcd is, what is wrong, and, on a node that an agent has programmed, as root, of its\n" +
			"kernel and of what its daemons answer. No password, key or certificate gets into it; manifest.json in it says what was collected, and what was not and\n" +
			"why. With --redact, names and addresses are replaced by others. In a container: kubectl exec -n NAMESPACE POD -- egret bundle -o - >egret-bundle.tar.gz\n" +
			"The exit status is 0 when all is in it, 3 when something is missing or not whole, and 1 when there is no archive.",
		Args: cobra.NoArgs,
	}
	s := c.Flags()
	etcd.addOperator(s)
	s.StringVarP(&output, "output", "o", "", "file to write, which must not be there yet; - is the standard output (default: egret-bundle-TIME.tar.gz here)")
	s.BoolVar(&cfg.Node, "node", false, "collect this node's kernel and daemons (default: when run as root where an agent has made its links)")
	s.StringVar(&nodeIP, "node-ip", "", "address of this node that the overlay uses (default: look at the default route's link)")
	s.StringVar(&cfg.Agent, "status-address", fmt.Sprintf("127.0.0.1:%d", egress.StatusPort), "what this node's agent has as --status-address")
	s.StringVar(&cfg.Crdsync, "crdsync-status-address", fmt.Sprintf("127.0.0.1:%d", egress.SyncStatusPort), "what a crdsync on this node has as --status-address")
	s.BoolVar(&cfg.Redact, "redact", false, "replace names and addresses, the same ones alike all over the archive")
	s.DurationVar(&cfg.Timeout, "timeout", bundle.DefaultTimeout, "how long it may take; what is not there by then is left out")
	c.RunE = configured(nil, func(c *cobra.Command, _ []string) error {
		if cfg.Timeout <= 0 {
			return fmt.Errorf("--timeout %v: want more than 0s", cfg.Timeout)
		}
		if nodeIP != "" {
			ip, err := netip.ParseAddr(nodeIP)
			if err != nil {
				return fmt.Errorf("--node-ip %q: want an IPv4 or IPv6 address", nodeIP)
			}
			cfg.NodeIP = ip.Unmap()
		}
		root := os.Geteuid() == 0
		if cfg.Node && !root {
			return errors.New("--node reads the kernel: run it as root")
		}
		if !s.Changed("node") {
			cfg.Node = root && bundle.OnNode()
		}
		cfg.Version, cfg.Endpoints = version, etcd.endpoints
		_, password, _ := strings.Cut(etcd.user, ":")
		cfg.Hide = secrets(password, etcd.password)
		return writeBundle(c, &etcd, cfg, output)
	})
	return c
}

// secrets returns the passwords of those. What is short would be found everywhere.
func secrets(passwords ...string) (out []string) {
	for _, p := range passwords {
		if len(p) >= 4 {
			out = append(out, p)
		}
	}
	return out
}

// writeBundle collects, and writes to a file, or to the standard output. Where there is no archive in the end there is
// no file.
func writeBundle(c *cobra.Command, etcd *etcdFlags, cfg bundle.Config, output string) error {
	to, report := c.OutOrStdout(), c.ErrOrStderr()
	if output == "-" && isTerminal(to) {
		return errors.New("--output -: this is an archive, and the standard output is a terminal: redirect it into a file")
	}
	discard := func() {}
	if output == "" {
		output = "egret-bundle-" + time.Now().UTC().Format("20060102T150405Z") + ".tar.gz"
	}
	var file *os.File
	if output != "-" {
		var err error
		if file, err = os.OpenFile(output, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); errors.Is(err, os.ErrExist) {
			return fmt.Errorf("--output %s: it is there already, and nothing is overwritten: name another file", output)
		} else if err != nil {
			return fmt.Errorf("--output: %w: name a file in a folder that takes one, or - for the standard output", err)
		}
		to, report = file, c.OutOrStdout()
		discard = func() { _, _ = file.Close(), os.Remove(output) } // what is left of it is no archive
	}
	m, err := collect(c.Context(), etcd, cfg, to)
	if err == nil && !m.Collected() {
		err = fmt.Errorf("nothing could be collected: %s", m.Failed()[0].Error)
	}
	if err == nil && file != nil {
		err = errors.Join(file.Sync(), file.Close())
	}
	if err != nil {
		discard()
		return err
	}
	failed := m.Failed()
	for _, f := range failed {
		fmt.Fprintf(report, "not there, or not whole: %s: %s\n", f.Name, strings.ReplaceAll(f.Error, "\n", "; "))
	}
	if output != "-" {
		fmt.Fprintf(report, "%s: %d files\n", output, len(m.Files))
	}
	if len(failed) > 0 {
		return operator.Verdict{Status: 3, Text: fmt.Sprintf("%d of %d parts are missing or not whole: manifest.json in the archive says why", len(failed), len(m.Files))}
	}
	return nil
}

func collect(ctx context.Context, etcd *etcdFlags, cfg bundle.Config, w io.Writer) (bundle.Manifest, error) {
	if cfg.Client, cfg.Unreached = etcd.dial(ctx, quiet); cfg.Client != nil {
		defer cfg.Client.Close()
	}
	return bundle.Write(ctx, cfg, w)
}
