// Package appliance turns a small computer with a Keyhaven image into a connector that needs nobody: it reads the one file
// that a person puts on the card, sets the machine up by it, enrols the connector, keeps its services running, and says how
// it is where a beginner looks: in a text file on the card, on the screen, and with the LED.
//
// Reading the file ([Parse]) and rendering what the machine's services read is the same on every system, so that a
// file can be checked anywhere. The [Agent] works on Linux, on a [Host] that tests replace.
package appliance
