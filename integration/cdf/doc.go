// Package cdf sums up durations that were measured: quantiles, and a plot of cumulative distributions as SVG. It is
// pure.
package cdf
