// Package aws assigns egress IPs to network interfaces of EC2: secondary private IPv4 addresses, and IPv6 addresses
// (docs/aws.md).
//
// Region, credentials and the signature are the AWS SDK's. The five actions are asked for here, in EC2's query
// protocol: the SDK's own package service/ec2 has 700 of them, and takes minutes and 3 GB of memory to compile, which
// all who build, check or test this repository would pay.
//
// It asks once, and tries nothing again: package cloud does. It owns nothing.
package aws
