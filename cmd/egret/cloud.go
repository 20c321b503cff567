package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/cloud"
	"github.com/egret-project/egret/cloud/aws"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

func cloudCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "cloud",
		Short: "Have the network of a cloud send what is for an egress IP to its owner",
		Args:  cobra.NoArgs,
	}
	c.AddCommand(awsCommand())
	return c
}

func awsCommand() *cobra.Command {
	var (
		etcd       etcdFlags
		config, id string
		ttl, check time.Duration
		ec2        aws.Config
		watched    monitorFlags
		logs       logFlags
	)
	c := &cobra.Command{
		Use:   "aws",
		Short: "Assign egress IPs to the EC2 network interfaces of their owners",
		Long: "Follows in etcd who owns each egress IP, and assigns it to the network interface of the owner's node (docs/aws.md). Runs in one or more\n" +
			"replicas, of which an election in etcd picks the one that assigns. Credentials are found as all programs with AWS's SDK find them.",
		Args: cobra.NoArgs,
	}
	s := c.Flags()
	etcd.add(s)
	host, _ := os.Hostname() // without one, the process id alone tells replicas apart
	s.StringVar(&config, "config", "", "YAML file of these options, without the dashes; the command line wins")
	s.StringVar(&id, "id", fmt.Sprintf("%s/%d", host, os.Getpid()), "name of this replica in the election")
	s.DurationVar(&ttl, "election-ttl", 10*time.Second, "how long a silent leader stays leader; whole seconds, at least 2s")
	s.DurationVar(&check, "check-interval", cloud.DefaultCheckInterval, "how often it is read in EC2 who has the egress IPs, 1s at least: what others change is mended then")
	s.StringVar(&ec2.Region, "region", "", "region of the VPC (default: AWS_REGION, or that of the instance that this runs on)")
	s.StringVar(&ec2.VPC, "vpc", "", "id of the VPC of the nodes, like vpc-0123456789abcdef0 (default: that of the instance that this runs on)")
	s.StringVar(&ec2.Endpoint, "endpoint-url", "", "URL of EC2's API, like that of a VPC endpoint (default: AWS_ENDPOINT_URL, or the region's)")
	watched.add(s, egress.CloudStatusPort)
	logs.add(s)
	c.RunE = configured(&config, func(c *cobra.Command, _ []string) error {
		log, level, err := logs.logger(os.Stderr)
		if ttl < 2*time.Second || ttl%time.Second != 0 {
			err = errors.Join(err, fmt.Errorf("--election-ttl %v: want whole seconds, at least 2s", ttl))
		}
		if check < time.Second {
			err = errors.Join(err, fmt.Errorf("--check-interval %v: want 1s at least", check))
		}
		if err = errors.Join(err, watched.Validate(), etcd.secured()); err != nil {
			return err
		}
		slog.SetDefault(log)
		etcd.warn(log)
		cfg := cloud.Config{ID: id, ElectionTTL: ttl, CheckInterval: check, Log: log}
		cfg.Monitor, cfg.Metrics = watched.server(log, level)
		cfg.Monitor.Ready(cloud.ReadyCheck, waitsForEtcd)
		return serving(c.Context(), cfg.Monitor, func() error {
			api, err := aws.New(c.Context(), ec2)
			if err != nil {
				return err
			}
			client, err := etcd.await(c.Context(), log)
			if err != nil {
				return err
			}
			defer client.Close()
			defer sayRights(c.Context(), client, store.CloudGrants, store.OwnerPrefix, log)()
			log.Info("egret cloud aws", "version", version, "id", id, "endpoints", etcd.endpoints, "api", api)
			cfg.Store, cfg.Cloud = client, api
			return cloud.Run(c.Context(), cfg)
		})
	})
	return c
}
