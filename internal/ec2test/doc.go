// Package ec2test is for tests: a small fake of EC2's query API, with the five actions on addresses of network
// interfaces that Egret asks for, and faults: answers that are delayed or lost, requests that are done late,
// throttling. What it refuses, EC2 refuses; what it takes, EC2 may refuse all the same.
package ec2test
