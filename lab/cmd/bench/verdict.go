// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
)

// bound is what a target allows.
type bound struct {
	value float64
	least bool // the value is the least that is allowed rather than the most
}

func atMost(value float64) bound  { return bound{value: value} }
func atLeast(value float64) bound { return bound{value: value, least: true} }

// verdict says whether a target was reached.
type verdict string

const (
	met       verdict = "met"       // the whole interval is within the bound
	missed    verdict = "missed"    // none of it is
	undecided verdict = "undecided" // the bound lies inside of it, or there are too few rounds
)

// judge compares an estimate with the bound. by is how far, as a fraction of the bound,
// the nearest end of the interval is from it.
func (b bound) judge(e estimate) (v verdict, by float64) {
	within, beyond := e.high, e.low // the ends that the verdict depends on
	sign := 1.0
	if b.least {
		within, beyond, sign = e.low, e.high, -1
	}
	switch {
	case sign*within <= sign*b.value:
		return met, math.Abs(within/b.value - 1)
	case sign*beyond > sign*b.value:
		return missed, math.Abs(beyond/b.value - 1)
	}
	return undecided, 0 // also for NaN
}

// goal is a target that a measurement has to reach.
type goal struct {
	of    string // the measurement whose rounds continue until this is decided
	what  string
	bound bound
	// values returns what is compared with the bound: one value of each round.
	values   func() []float64
	unit     string
	decimals int
	// reason explains a miss, nil if there is nothing to explain.
	reason func() string
}

// judge compares what was measured with the goal. looks is how often that is done while
// rounds are added: each time could err, so the risk is shared among them.
func (g goal) judge(looks int) (verdict, string) {
	values := g.values()
	e, enough := estimateAt(values, risk/float64(looks))
	v, by := g.bound.judge(e)
	shown := e.show(g.decimals) + g.unit
	switch {
	case !enough || v == undecided:
		return undecided, fmt.Sprintf("%s in %d rounds", shown, len(values))
	case v == met:
		return met, fmt.Sprintf("%s, which leaves %.1f %%", shown, 100*by)
	default:
		return missed, fmt.Sprintf("%s, which is %.1f %% too %s", shown, 100*by, map[bool]string{true: "low", false: "high"}[g.bound.least])
	}
}

// decided reports whether nothing is undecided among the goals of a measurement.
func decided(goals []goal, of string, looks int) bool {
	for _, g := range goals {
		if g.of != of {
			continue
		}
		if v, _ := g.judge(looks); v == undecided {
			return false
		}
	}
	return true
}

// looks returns after how many rounds to look whether a comparison is decided: after the
// first rounds, and each time when there are twice as many, up to most.
func looks(rounds, most int) (after []int) {
	for n := rounds; n < most; n *= 2 {
		after = append(after, n)
	}
	return append(after, max(rounds, most))
}
